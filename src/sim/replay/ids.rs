//! Ids that differ from run to run: task ids, digests, uuids, addresses. A recorded one is matched with the
//! simulator's where it first appears, and must be matched by the same ever after.

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use std::collections::BTreeMap;

/// A piece of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Text(String),
    /// An id that is mapped.
    Id(String),
    /// Something that is never the same: a clock, a process id.
    Any(&'static str),
}

/// Recorded ids and what stands for them here.
#[derive(Debug, Default, Clone)]
pub(super) struct Ids {
    known: BTreeMap<String, String>,
    back: BTreeMap<String, String>,
}

impl Ids {
    /// Puts the simulator's ids into a recorded text.
    pub(super) fn translate(&self, text: &str) -> String {
        let mut out = text.to_owned();
        for (recorded, ours) in &self.known {
            if recorded == ours {
                continue;
            }
            if out.contains(recorded.as_str()) {
                out = out.replace(recorded.as_str(), ours);
            }
            let encoded = utf8_percent_encode(recorded, NON_ALPHANUMERIC).to_string();
            if recorded.starts_with("UPID:") && out.contains('%') {
                let loose = encoded.replace("%2D", "-").replace("%2E", ".").replace("%5F", "_");
                out = out.replace(&loose, &utf8_percent_encode(ours, NON_ALPHANUMERIC).to_string());
            }
        }
        out
    }

    /// Says that `ours` stands for `recorded`.
    pub(super) fn bind(&mut self, recorded: &str, ours: &str) {
        self.known.insert(recorded.to_owned(), ours.to_owned());
        self.back.insert(ours.to_owned(), recorded.to_owned());
    }

    /// Whether two texts say the same, ids apart; learns ids it has not seen.
    pub(super) fn same(&mut self, recorded: &str, ours: &str) -> bool {
        if recorded == ours {
            return true;
        }
        if recorded.contains("<redacted>") {
            return !ours.is_empty();
        }
        let (left, right) = (tokens(recorded), tokens(ours));
        if left.len() != right.len() {
            return false;
        }
        let mut fresh = Vec::new();
        for pair in left.iter().zip(&right) {
            match pair {
                (Token::Text(a), Token::Text(b)) if a == b => {}
                (Token::Any(a), Token::Any(b)) if a == b => {}
                (Token::Id(a), Token::Id(b)) => match (self.known.get(a), self.back.get(b)) {
                    (Some(known), _) if known == b => {}
                    // A vmgenid or digest may come back to a value it had.
                    (None, None) if alike(a, b) => fresh.push((a.clone(), b.clone())),
                    _ => return false,
                },
                _ => return false,
            }
        }
        for (a, b) in fresh {
            self.bind(&a, &b);
        }
        true
    }
}

/// Whether one id may stand for the other: of task ids everything but process and time is the same.
fn alike(recorded: &str, ours: &str) -> bool {
    if recorded.starts_with("UPID:") || ours.starts_with("UPID:") {
        let fixed = |upid: &str| -> Vec<String> {
            let fields: Vec<&str> = upid.split(':').collect();
            fields
                .iter()
                .enumerate()
                .filter(|(i, _)| !(2..=4).contains(i))
                .map(|(_, f)| (*f).to_owned())
                .collect()
        };
        return fixed(recorded) == fixed(ours);
    }
    recorded.len() == ours.len()
}

/// The length of the id at the start of `text`, or of the thing that never repeats.
fn id_at(text: &str) -> Option<(usize, Option<&'static str>)> {
    let bytes = text.as_bytes();
    let hex = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_hexdigit);
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    if text.starts_with("UPID:") {
        let ends: Vec<usize> = text.char_indices().filter(|(_, c)| *c == ':').map(|(at, _)| at).collect();
        return ends.get(7).map(|end| (end + 1, None));
    }
    for (prefix, kind) in [("ctime=", "ctime"), (".tmp.", "tmp"), ("duration 00:", "duration")] {
        if text.starts_with(prefix) {
            let mut end = prefix.len();
            while digit(end) || bytes.get(end) == Some(&b':') {
                end += 1;
            }
            return (end > prefix.len()).then_some((end, Some(kind)));
        }
    }
    // 2026-11-20 10:45:27
    let shape = |pattern: &[u8]| {
        pattern.iter().enumerate().all(|(at, wanted)| match wanted {
            b'd' => digit(at),
            b'h' => hex(at),
            other => bytes.get(at) == Some(other),
        })
    };
    if shape(b"dddd-dd-dd dd:dd:dd") {
        return Some((19, Some("date")));
    }
    if shape(b"hhhhhhhh-hhhh-hhhh-hhhh-hhhhhhhhhhhh") && !hex(36) {
        return Some((36, None));
    }
    let hexes = (0..bytes.len()).take_while(|at| hex(*at)).count();
    if hexes == 40 {
        return Some((40, None));
    }
    let pairs = (0..text.len())
        .take_while(|n| hex(n * 3) && hex(n * 3 + 1) && bytes.get(n * 3 + 2) == Some(&b':'))
        .count();
    if pairs >= 5 && hex(pairs * 3) && hex(pairs * 3 + 1) {
        return Some((pairs * 3 + 2, None));
    }
    None
}

fn tokens(text: &str) -> Vec<Token> {
    let mut out = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let fresh_word = !before.is_ascii_alphanumeric();
        if let Some((length, kind)) = id_at(rest).filter(|_| fresh_word || rest.starts_with(".tmp.")) {
            if !literal.is_empty() {
                out.push(Token::Text(std::mem::take(&mut literal)));
            }
            out.push(kind.map_or_else(|| Token::Id(rest[..length].to_owned()), Token::Any));
            rest = &rest[length..];
            before = ' ';
        } else {
            literal.push(c);
            rest = &rest[c.len_utf8()..];
            before = c;
        }
    }
    if !literal.is_empty() {
        out.push(Token::Text(literal));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_keeps_its_partner() {
        let mut ids = Ids::default();
        let (a, b, c) = ("a".repeat(40), "b".repeat(40), "c".repeat(40));
        assert!(ids.same(&a, &b));
        assert!(ids.same(&format!("digest {a}"), &format!("digest {b}")));
        assert!(!ids.same(&a, &c));
        assert!(!ids.same(&c, &b), "two recorded digests cannot be one of ours");
        assert_eq!(ids.translate(&format!("x={a}")), format!("x={b}"));
    }

    #[test]
    fn task_ids_must_be_of_the_same_task() {
        let mut ids = Ids::default();
        let upid = |pid: &str, kind: &str| {
            format!("UPID:pve1:{pid}:00021E5E:6B001EFB:{kind}:9999@local:csi@pve!csi:")
        };
        assert!(ids.same(&upid("00004B43", "imgdel"), &upid("00000001", "imgdel")));
        assert!(!ids.same(&upid("00004B44", "imgdel"), &upid("00000002", "imgcopy")));
        let path = "/nodes/pve1/tasks/UPID%3Apve1%3A00004B43%3A00021E5E%3A6B001EFB%3Aimgdel%3A9999%40local%3Acsi%40pve%21csi%3A/log";
        assert!(ids.translate(path).contains("00000001"));
    }

    #[test]
    fn clocks_are_not_compared() {
        let mut ids = Ids::default();
        assert!(ids.same("creation-qemu=10.0.13,ctime=1795169956", "creation-qemu=10.0.13,ctime=1"));
        assert!(ids.same("2026-11-20 10:45:27 starting", "2025-01-02 00:00:00 starting"));
        assert!(!ids.same("creation-qemu=10.0.13,ctime=1", "creation-qemu=10.0.14,ctime=1"));
    }
}
