//! Who asks and with which parameters.

use crate::sim::Sim;
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::{Params, flag};
use axum::body::Body;
use http::{HeaderMap, Method, header, request::Parts};
use percent_encoding::percent_decode_str;
use serde_json::Value;

/// Body sizes pve-http-server takes (`AnyEvent.pm:$limit_max_post`).
const LARGEST_BODY: usize = 512 * 1024;

/// A call that has passed authentication, permissions and parameter verification.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) sim: Sim,
    /// The node whose pveproxy took the call, where it came in on one.
    pub(crate) via: Option<String>,
    /// User or token.
    pub(crate) user: String,
    /// Parameters of path, query and body.
    pub(crate) params: Params,
    /// The same as they were sent.
    pub(crate) sent: Params,
    /// Bytes of the file that came with a form of parts.
    pub(crate) upload: Option<u64>,
}

impl Call {
    /// A parameter that the route's table demands.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.params.get(name).map_or("", String::as_str)
    }

    /// A parameter that may be absent.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.params.get(name).map(String::as_str)
    }

    /// Whether a parameter is set and true.
    pub(crate) fn flag(&self, name: &str) -> bool {
        flag(&self.params, name)
    }

    /// The node that answers what names no node.
    pub(crate) fn here(&self) -> String {
        self.via.clone().unwrap_or_else(|| self.sim.read(crate::sim::state::State::first_node))
    }

    /// Whether a node is online, seen from here.
    pub(crate) fn hears(&self, node: &str) -> bool {
        self.sim.read(|state| state.hears(self.via.as_deref(), node))
    }

    /// The node in the path.
    pub(crate) fn node(&self) -> &str {
        self.text("node")
    }

    /// The VM id, which verification has let through as a number.
    pub(crate) fn vmid(&self) -> u32 {
        self.text("vmid").parse().unwrap_or_default()
    }

    /// Refuses unless the caller has one of the privileges at the path.
    pub(crate) fn check(&self, path: &str, any: &[&str]) -> Result<(), PveError> {
        self.sim.read(|state| state.access.check(&self.user, path, any))
    }

    /// Whether the caller has one of the privileges at the path.
    pub(crate) fn may(&self, path: &str, any: &[&str]) -> bool {
        self.sim.read(|state| state.access.has(&self.user, path, any))
    }
}

/// The token of the request. Every wrong one gets the same answer (pve-manager `HTTPServer.pm:auth_handler`).
pub(super) fn authenticate(sim: &Sim, method: &Method, headers: &HeaderMap) -> Result<String, PveError> {
    if let Some(ticket) = ticket_in(headers) {
        let user = sim.ticket_user(&ticket);
        let user =
            user.ok_or_else(|| PveError::Unauthorized("permission denied - invalid PVE ticket".to_owned()))?;
        let token = headers.get("CSRFPreventionToken").and_then(|value| value.to_str().ok());
        if *method != Method::GET && !token.is_some_and(|token| sim.csrf_fits(&user, token)) {
            return Err(PveError::Unauthorized("Permission denied - invalid csrf token".to_owned()));
        }
        return Ok(user);
    }
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let Some(token) = value.and_then(|value| value.strip_prefix("PVEAPIToken=")) else {
        return Err(PveError::Unauthorized("No ticket".to_owned()));
    };
    let failed = || PveError::Unauthorized("Authentication failed!".to_owned());
    let (id, secret) = token.split_once('=').ok_or_else(failed)?;
    let now = sim.clock().now();
    let known = sim.read(|state| {
        let user = id.split('!').next().unwrap_or_default();
        let expire = state.token_notes.get(id).map_or(0, |note| note.expire);
        let good = state.user_is_enabled(user, now) && (expire == 0 || expire >= now);
        state.tokens.get(id).filter(|_| good).cloned().flatten()
    });
    if known.as_deref() == Some(secret) { Ok(id.to_owned()) } else { Err(failed()) }
}

/// Whether a request comes with a token (pve-manager `HTTPServer.pm:auth_handler`).
pub(super) fn is_token(headers: &HeaderMap) -> bool {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    ticket_in(headers).is_none() && value.is_some_and(|value| value.starts_with("PVEAPIToken="))
}

/// The ticket in the cookie, or in the header of the same form.
fn ticket_in(headers: &HeaderMap) -> Option<String> {
    let cookies = headers.get_all(header::COOKIE).iter().chain(headers.get_all(header::AUTHORIZATION));
    let pairs = cookies.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(';'));
    pairs.filter_map(|pair| pair.trim().strip_prefix("PVEAuthCookie=")).map(decode).next()
}

/// Bytes of an upload; PVE has no limit, a simulator in memory has one.
const LARGEST_UPLOAD: usize = 256 << 20;

/// Parameters of query and body, and the bytes of a file that came along. A JSON body is taken as well as a form, and a
/// form of parts where a file is uploaded (pve-http-server `AnyEvent.pm:file_upload_multipart`).
pub(super) async fn parameters(parts: &Parts, body: Body) -> Result<(Params, Option<u64>), PveError> {
    let mut params = Params::new();
    read_form(parts.uri.query().unwrap_or_default(), &mut params);
    let content_type =
        parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let boundary = content_type.strip_prefix("multipart/form-data").and_then(|rest| {
        rest.split(';')
            .find_map(|part| part.trim().strip_prefix("boundary="))
            .map(|text| text.trim_matches('"'))
    });
    let limit = if boundary.is_some() { LARGEST_UPLOAD } else { LARGEST_BODY };
    let body = axum::body::to_bytes(body, limit)
        .await
        .map_err(|_| PveError::Status(501, "for data too large".to_owned()))?;
    if body.is_empty() {
        return Ok((params, None));
    }
    if let Some(boundary) = boundary {
        let upload = super::multipart::read(boundary, &body, &mut params);
        return Ok((params, upload));
    }
    if content_type.starts_with("application/json") {
        let value: Value = serde_json::from_slice(&body)
            .map_err(|error| PveError::Status(400, format!("unable to parse JSON body: {error}")))?;
        for (name, value) in value.as_object().into_iter().flatten() {
            let text = match value {
                Value::Null => continue,
                Value::String(text) => text.clone(),
                Value::Bool(flag) => u8::from(*flag).to_string(),
                Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join("\0"),
                other => other.to_string(),
            };
            params.insert(name.clone(), text);
        }
    } else {
        read_form(&String::from_utf8_lossy(&body), &mut params);
    }
    Ok((params, None))
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn read_form(text: &str, params: &mut Params) {
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        // A name that comes twice is a list (pve-http-server `AnyEvent.pm:extract_params`).
        params
            .entry(decode(name))
            .and_modify(|list| *list = format!("{list}\0{}", decode(value)))
            .or_insert_with(|| decode(value));
    }
}

fn decode(text: &str) -> String {
    percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned()
}
