//! Answers: JSON bodies, and the reason phrase that carries the error's text.

use crate::sim::rules::error::PveError;
use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, StatusCode, header};
use hyper::ext::ReasonPhrase;
use serde_json::{Value, json};

/// A successful answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reply {
    /// What goes under `data`.
    pub(crate) data: Value,
    /// What goes under `total`, in listings that can be cut.
    pub(crate) total: Option<usize>,
}

impl From<Value> for Reply {
    fn from(data: Value) -> Self {
        Self { data, total: None }
    }
}

impl From<Vec<Value>> for Reply {
    fn from(entries: Vec<Value>) -> Self {
        Value::Array(entries).into()
    }
}

impl Reply {
    /// `{"data":null}`
    pub(crate) fn null() -> Self {
        Value::Null.into()
    }
}

const JSON: HeaderValue = HeaderValue::from_static("application/json;charset=UTF-8");

pub(super) fn reply(reply: &Reply) -> Response {
    // Put together as text: what goes under `data` may be long, and `json!` would copy it.
    let total = reply.total.map_or_else(String::new, |total| format!(",\"total\":{total}"));
    build(StatusCode::OK, None, Some(format!("{{\"data\":{}{total}}}", reply.data)))
}

/// The first line of the error's text: what fits into a status line.
fn first_line(error: &PveError) -> &str {
    error.message().split('\n').next().unwrap_or_default()
}

pub(super) fn reason(result: &Result<Reply, PveError>) -> String {
    result.as_ref().map_or_else(|error| first_line(error).to_owned(), |_| "OK".to_owned())
}

pub(super) fn error(error: &PveError) -> Response {
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = match error {
        PveError::Unauthorized(_) | PveError::Proxy(_) => None,
        PveError::NotImplemented(text) => Some(json!({ "data": null, "message": text })),
        PveError::Parameters(errors) => {
            Some(json!({ "data": null, "message": format!("{}\n", error.message()), "errors": errors }))
        }
        PveError::Status(..) | PveError::Die(_) => {
            Some(json!({ "data": null, "message": format!("{}\n", error.message()) }))
        }
    };
    build(status, Some(first_line(error)), body.map(|body| body.to_string()))
}

fn build(status: StatusCode, reason: Option<&str>, body: Option<String>) -> Response {
    let has_body = body.is_some();
    let mut response = Response::new(body.map_or_else(Body::empty, Body::from));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::SERVER, HeaderValue::from_static("pve-api-daemon/3.0"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("max-age=0"));
    if has_body {
        headers.insert(header::CONTENT_TYPE, JSON);
    }
    if status.as_u16() >= 400 {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(phrase) = reason.and_then(|text| ReasonPhrase::try_from(text.as_bytes().to_vec()).ok()) {
        response.extensions_mut().insert(phrase);
    }
    response
}
