//! The only place that knows gRPC codes.

mod controller;
mod node;

use tonic::{Code, Status};

/// A status whose text is the error and its causes, each once.
pub(super) fn with_chain(code: Code, error: &dyn std::error::Error) -> Status {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    Status::new(code, text)
}
