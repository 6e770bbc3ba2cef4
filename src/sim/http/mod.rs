//! HTTP as pveproxy speaks it: error texts in the reason phrase, token authentication, forms and JSON bodies
//! (pve-http-server `APIServer/AnyEvent.pm`, pve-manager `HTTPServer.pm`). `handle` is the way of a request.

mod answer;
mod control;
mod multipart;
mod page;
mod request;
mod routes;
mod serve;
mod service;

pub use serve::{Listening, ServeError, Tls};
pub use service::{ConnectionLost, SimService};

pub(crate) use answer::Reply;
pub(crate) use request::Call;
pub(crate) use routes::Act;

use super::Sim;
use super::clock::Cost;
use super::faults::Fault;
use super::misreading::Misreading;
use super::rules::api;
use super::rules::error::PveError;
use super::rules::schema::NOT_DEFINED;
use super::state::{LogEntry, State};
use axum::Router;
use axum::body::Body;
use axum::extract;
use axum::response::Response;
use http::{Method, Request};
use std::time::Duration;

/// Marks an answer that must not reach the client: a fault has lost the request or its answer. The listener ends the
/// connection; `SimService` fails.
#[derive(Debug, Clone, Copy)]
pub struct Lost;

/// The node on whose address a request came in.
#[derive(Debug, Clone)]
pub(crate) struct Via(pub(crate) String);

/// The refusal of a parameter that stands in the path already (pve-manager `HTTPServer.pm:rest_handler`).
const CONFLICTING: &str = "duplicate parameter (already defined in URI) with conflicting values!";

const PREFIX: &str = "/api2/json";

/// Requests that are remembered; a container may run for weeks.
const LONGEST_LOG: usize = 20_000;

impl Sim {
    /// The API, and `/_sim/…` to look into the simulator and to play faults.
    pub fn router(&self) -> Router {
        control::routes().fallback(api).with_state(self.clone())
    }
}

async fn api(extract::State(sim): extract::State<Sim>, request: Request<Body>) -> Response {
    // A client that goes away stops nothing: PVE's workers finish what they have begun.
    let work = tokio::spawn(async move { handle(&sim, request).await });
    work.await.unwrap_or_else(|error| {
        tracing::error!(%error, "the simulator failed on a request");
        answer::error(&PveError::die("the simulator failed on this request; its log has the panic"))
    })
}

/// The error as it is, but in the test of the replay that has it wrong.
fn misread(sim: &Sim, error: PveError) -> PveError {
    let wrong = sim.read(|state| state.misreading == Some(Misreading::MissingIs404));
    match error {
        PveError::Die(text) if wrong && text.contains("does not exist") => PveError::Status(404, text),
        error => error,
    }
}

async fn handle(sim: &Sim, request: Request<Body>) -> Response {
    let begun = sim.clock().elapsed();
    let (parts, body) = request.into_parts();
    let target = parts.uri.path_and_query().map_or_else(String::new, ToString::to_string);
    let method = parts.method.as_str().to_owned();
    let faults =
        sim.change(|state| state.faults.hit_request(&method, target.strip_prefix(PREFIX).unwrap_or(&target)));

    let mut user = String::new();
    let mut lost = false;
    let mut result = None;
    for fault in &faults {
        match fault {
            Fault::Delay { ms, .. } => tokio::time::sleep(Duration::from_millis(*ms)).await,
            Fault::Refuse { status: 595, text, .. } => result = Some(Err(PveError::Proxy(text.clone()))),
            Fault::Refuse { status, text, .. } => result = Some(Err(PveError::Status(*status, text.clone()))),
            Fault::LoseRequest { .. } => {
                lost = true;
                result = Some(Err(PveError::Proxy("lost".to_owned())));
            }
            _ => {}
        }
    }
    let result = match result {
        Some(result) => result,
        None => perform(sim, &parts, body, &mut user).await,
    };
    let result = result.map_err(|error| misread(sim, error));
    for fault in &faults {
        match fault {
            Fault::DelayAnswer { ms, .. } => tokio::time::sleep(Duration::from_millis(*ms)).await,
            Fault::LoseAnswer { .. } => lost = true,
            _ => {}
        }
    }
    let mut response = match &result {
        Ok(reply) => answer::reply(reply),
        Err(error) => answer::error(error),
    };
    let ended = sim.clock().elapsed();
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    sim.change(|state| {
        if let Err(PveError::NotImplemented(text)) = &result {
            *state.unmodelled.entry(text.clone()).or_default() += 1;
        }
        let n = state.log.back().map_or(0, |entry| entry.n) + 1;
        if state.log.len() >= LONGEST_LOG {
            state.log.pop_front();
        }
        state.log.push_back(LogEntry {
            n,
            at_ms: millis(begun),
            method: method.clone(),
            path: target.clone(),
            user: user.clone(),
            status: if lost { 0 } else { response.status().as_u16() },
            reason: if lost { "lost by a fault".to_owned() } else { answer::reason(&result) },
            elapsed_ms: millis(ended.saturating_sub(begun)),
        });
    });
    // Nothing leaves that a restart would not know.
    if parts.method == Method::GET && faults.is_empty() {
        sim.save_if_dirty().await;
    } else {
        sim.save().await;
    }
    tracing::debug!(method, path = target, user, status = response.status().as_u16(), lost, "request");
    if lost {
        response.extensions_mut().insert(Lost);
    }
    response
}

async fn perform(
    sim: &Sim,
    parts: &http::request::Parts,
    body: Body,
    user: &mut String,
) -> Result<Reply, PveError> {
    let path = parts.uri.path();
    let Some(path) = path.strip_prefix(PREFIX) else {
        return Err(PveError::NotImplemented(format!("no such file '{path}'")));
    };
    let version = sim.read(|state| state.version);
    let found = api::find(parts.method.as_str(), path).filter(|found| version.has_call(found.pattern));
    let open = found.as_ref().is_some_and(|found| found.endpoint.is_open());
    if !open {
        *user = match request::authenticate(sim, &parts.method, &parts.headers) {
            Ok(user) => user,
            Err(error) => {
                sim.clock().spend(Cost::AuthFailure).await;
                return Err(error);
            }
        };
    }
    let (mut params, upload) = request::parameters(parts, body).await?;
    let found = found.ok_or_else(|| {
        PveError::NotImplemented(format!("Method '{} {path}' not implemented", parts.method))
    })?;
    sim.clock().spend(Cost::Answer).await;
    let other = |(name, value): &(&String, &String)| params.get(*name).is_some_and(|sent| sent != *value);
    if let Some((name, _)) = found.in_path.iter().find(other) {
        return Err(PveError::parameter(name, CONFLICTING));
    }
    params.extend(found.in_path.clone());
    // pve-manager `HTTPServer.pm:rest_handler`
    if request::is_token(&parts.headers) && !found.endpoint.allows_tokens() {
        let text = format!("URI '{path}' not available with API token, need proper ticket.\n");
        return Err(PveError::Status(403, format!("Permission check failed ({text})")));
    }
    let via = parts.extensions.get::<Via>().map(|via| via.0.clone());
    // `localhost` is the node that is asked (pve-manager `HTTPServer.pm:rest_handler`).
    if params.get("node").is_some_and(|node| node == "localhost") {
        let here = via.clone().unwrap_or_else(|| sim.read(State::first_node));
        params.insert("node".to_owned(), here);
    }
    // Parameters come first, then the caller (pve-common `RESTHandler.pm:handle`, `HTTPServer.pm:rest_handler`).
    sim.read(|state| found.endpoint.permits(&state.access, user, &params))?;
    let node = found.in_path.get("node").and_then(|_| params.get("node").cloned());
    if let Some(node) = node.as_ref().filter(|_| found.endpoint.is_proxied()) {
        reach(sim, via.as_deref(), node).await?;
    }
    let sent = params.clone();
    if let Some(name) = params.keys().find(|name| !version.has_parameter(found.pattern, name)) {
        return Err(PveError::parameter(name, NOT_DEFINED));
    }
    found.endpoint.verify(&mut params)?;
    let act = routes::act(parts.method.as_str(), found.pattern).ok_or_else(|| {
        PveError::NotImplemented(format!(
            "'{} {}' is not modelled by the simulator",
            parts.method, found.pattern
        ))
    })?;
    let call = Call { sim: sim.clone(), via, user: user.clone(), params, sent, upload };
    // Calls that need root run in pvedaemon, which has few workers.
    let _worker = match (&node, found.endpoint.is_protected()) {
        (Some(node), true) => {
            let worker = sim.locks().worker(node).await;
            sim.clock().spend(Cost::Forward).await;
            worker
        }
        _ => None,
    };
    super::api::perform(act, call).await
}

/// What becomes of a call that is for another node.
async fn reach(sim: &Sim, via: Option<&str>, node: &str) -> Result<(), PveError> {
    let heard = sim.read(|state| state.nodes.contains_key(node).then(|| state.hears(via, node)));
    match heard {
        None if sim.read(|state| state.hosts.contains(node)) => {
            sim.clock().spend(Cost::DeadNode).await;
            Err(PveError::Proxy("No route to host".to_owned()))
        }
        None => Err(PveError::die(format!(
            "hostname lookup '{node}' failed - failed to get address info for: {node}: Name or service not known"
        ))),
        Some(false) => {
            sim.clock().spend(Cost::DeadNode).await;
            Err(PveError::Proxy("No route to host".to_owned()))
        }
        Some(true) => Ok(()),
    }
}
