//! The ways a Proxmox VE call fails, and how each one reads as an HTTP answer or as a task's exit status.

use std::collections::BTreeMap;

/// A failed call. Texts carry no trailing line feed; PVE's own one is added where an answer shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PveError {
    /// Parameters refused: 400 `Parameter verification failed.` with one text per parameter.
    Parameters(BTreeMap<String, String>),
    /// An exception with a status of its own, such as 403 `Permission check failed (…)`.
    Status(u16, String),
    /// Any plain `die`: 500.
    Die(String),
    /// The request did not pass authentication: 401, empty body.
    Unauthorized(String),
    /// pveproxy could not reach the node: 595, empty body.
    Proxy(String),
    /// 501: PVE has no such call, or the simulator does not model it.
    NotImplemented(String),
}

impl PveError {
    /// Refuses one parameter.
    pub fn parameter(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self::Parameters(BTreeMap::from([(name.into(), text.into())]))
    }

    /// A plain `die`.
    pub fn die(text: impl Into<String>) -> Self {
        Self::Die(text.into())
    }

    /// The status of the answer.
    pub fn status(&self) -> u16 {
        match self {
            Self::Parameters(_) => 400,
            Self::Status(code, _) => *code,
            Self::Die(_) => 500,
            Self::Unauthorized(_) => 401,
            Self::Proxy(_) => 595,
            Self::NotImplemented(_) => 501,
        }
    }

    /// The text of the answer without its last line feed.
    pub fn message(&self) -> &str {
        match self {
            Self::Parameters(_) => "Parameter verification failed.",
            Self::Status(_, text)
            | Self::Die(text)
            | Self::Unauthorized(text)
            | Self::Proxy(text)
            | Self::NotImplemented(text) => text,
        }
    }

    /// What a task that ends with this error writes as exit status: one line, an exception with its code in front
    /// (pve-common `Exception.pm:stringify`, `RESTEnvironment.pm:fork_worker`).
    pub fn task_status(&self) -> String {
        let text = match self {
            Self::Parameters(errors) => {
                let lines = errors.iter().map(|(name, error)| format!("{name}: {error}"));
                std::iter::once("400 Parameter verification failed.".to_owned())
                    .chain(lines)
                    .collect::<Vec<_>>()
                    .join("\n")
            }
            Self::Status(code, text) => format!("{code} {text}"),
            // One line feed of its own is kept, as a blank.
            other => return other.message().replace('\n', " "),
        };
        text.trim_end_matches('\n').replace('\n', " ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_in_a_task_shows_its_code() {
        let error =
            PveError::Status(403, "Permission check failed (/storage/local, Datastore.AllocateSpace)".into());
        assert_eq!(
            error.task_status(),
            "403 Permission check failed (/storage/local, Datastore.AllocateSpace)"
        );
        let error = PveError::parameter("scsi3", "hotplug problem - x\n");
        assert_eq!(error.task_status(), "400 Parameter verification failed. scsi3: hotplug problem - x");
    }
}
