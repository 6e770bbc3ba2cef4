//! Forms of parts, as an upload sends them (RFC 7578).

use crate::sim::rules::schema::Params;

/// Reads the fields into `params`; a file's name goes under `filename`. Returns the bytes of the file, if there is one.
pub(super) fn read(boundary: &str, body: &[u8], params: &mut Params) -> Option<u64> {
    let mark = format!("--{boundary}");
    let mut size = None;
    for part in split(body, mark.as_bytes()) {
        let part = part.strip_prefix(b"\r\n").unwrap_or(part);
        let Some(at) = find(part, b"\r\n\r\n") else { continue };
        let (Some(head), Some(content)) = (part.get(..at), part.get(at + 4..)) else { continue };
        let content = content.strip_suffix(b"\r\n").unwrap_or(content);
        let head = String::from_utf8_lossy(head);
        let Some(name) = attribute(&head, "name") else { continue };
        match attribute(&head, "filename") {
            Some(file) => {
                params.insert("filename".to_owned(), file);
                size = u64::try_from(content.len()).ok();
            }
            None => drop(params.insert(name, String::from_utf8_lossy(content).into_owned())),
        }
    }
    size
}

/// The value of `name="…"` in the head of a part.
fn attribute(head: &str, name: &str) -> Option<String> {
    head.split([';', '\n']).find_map(|part| {
        let value = part.trim().strip_prefix(name)?.strip_prefix('=')?;
        Some(value.trim_matches('"').to_owned())
    })
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

fn split<'a>(mut text: &'a [u8], mark: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    std::iter::from_fn(move || {
        let at = find(text, mark)?;
        let part = text.get(..at)?;
        text = text.get(at + mark.len()..)?;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_a_file_are_read() {
        let body = "--b\r\nContent-Disposition: form-data; name=\"content\"\r\n\r\niso\r\n--b\r\nContent-Disposition: \
                    form-data; name=\"filename\"; filename=\"a.iso\"\r\nContent-Type: application/octet-stream\r\n\r\n\
                    \r\n12\r\n--b--\r\n";
        let mut params = Params::new();
        assert_eq!(read("b", body.as_bytes(), &mut params), Some(4));
        assert_eq!(params["content"], "iso");
        assert_eq!(params["filename"], "a.iso");
        assert_eq!(read("other", body.as_bytes(), &mut Params::new()), None);
    }
}
