//! Transcripts: one JSON object per line, a request with its answer, or an observation that is not a request.

use serde::Deserialize;
use serde_json::{Map, Value};

/// A request as it was sent.
#[derive(Debug, Clone, Deserialize)]
pub struct Request {
    /// Method.
    pub method: String,
    /// Path below the host, with `/api2/json`.
    pub path: String,
    /// Parameters of query or body.
    #[serde(default)]
    pub form: Option<Map<String, Value>>,
    /// `token <id>` or what else stands for the caller.
    #[serde(default)]
    pub auth: Option<String>,
}

/// An answer.
#[derive(Debug, Clone, Deserialize)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Reason phrase, absent where the record is of a task that was waited for.
    #[serde(default)]
    pub reason: Option<String>,
    /// Content type, null with an empty body; absent where it was not recorded.
    #[serde(default, deserialize_with = "present")]
    pub content_type: Option<Value>,
    /// Body: JSON, or an empty string.
    #[serde(default)]
    pub body: Value,
}

/// Tells a null from an absent value.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// A line of a transcript.
#[derive(Debug, Clone, Deserialize)]
pub struct Record {
    /// Place in the recording.
    pub seq: u32,
    /// Name.
    pub name: String,
    /// Absent in observations.
    #[serde(default)]
    pub request: Option<Request>,
    /// Absent in observations.
    #[serde(default)]
    pub response: Option<Response>,
}

/// A line that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("line {line} of the transcript is not a record")]
pub struct RecordError {
    line: usize,
    #[source]
    source: serde_json::Error,
}

impl Record {
    /// Reads a transcript, in order of `seq`.
    pub fn read(text: &str) -> Result<Vec<Self>, RecordError> {
        let mut records = Vec::new();
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let record: Self =
                serde_json::from_str(line).map_err(|source| RecordError { line: index + 1, source })?;
            records.push(record);
        }
        records.sort_by_key(|record| record.seq);
        Ok(records)
    }

    /// The group: the first letter of the name, or the second part of a name such as `H-E4-create-holder`.
    pub fn group(&self) -> String {
        match self.name.strip_prefix("H-") {
            Some(rest) => {
                let part = rest.split('-').next().unwrap_or_default();
                let digits = part.trim_end_matches(|c: char| c.is_ascii_lowercase() && part.starts_with('E'));
                format!("H-{digits}")
            }
            None => self.name.chars().take(1).collect(),
        }
    }
}
