//! `/_sim/…`: what a person or a demo asks the simulator itself. Not part of Proxmox VE, needs no token.

use super::page;
use crate::sim::Sim;
use crate::sim::faults::Fault;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};

pub(super) fn routes() -> Router<Sim> {
    Router::new()
        .route("/_sim", get(page::to_page))
        .route("/_sim/", get(page::page))
        .route("/_sim/live", get(page::live))
        .route("/_sim/unmodelled", get(unmodelled).delete(clear_unmodelled))
        .route("/_sim/faults", get(faults).post(inject).delete(clear))
        .route("/_sim/state", get(state))
        .route("/_sim/log", get(log).delete(clear_log))
}

fn answer(status: StatusCode, body: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

async fn faults(State(sim): State<Sim>) -> Response {
    let all = sim.read(|state| json!(state.faults.all()));
    answer(StatusCode::OK, &all)
}

/// Takes one fault or a list of them.
async fn inject(State(sim): State<Sim>, body: Bytes) -> Response {
    let faults: Result<Vec<Fault>, _> =
        serde_json::from_slice(&body).or_else(|_| serde_json::from_slice(&body).map(|fault| vec![fault]));
    let faults = match faults {
        Ok(faults) => faults,
        Err(error) => return answer(StatusCode::BAD_REQUEST, &json!({ "error": error.to_string() })),
    };
    for fault in faults {
        if let Err(error) = sim.inject(fault) {
            return answer(StatusCode::BAD_REQUEST, &json!({ "error": error.to_string() }));
        }
    }
    sim.save().await;
    answer(StatusCode::OK, &json!({ "ok": true }))
}

async fn clear(State(sim): State<Sim>) -> Response {
    sim.clear_faults();
    sim.save().await;
    answer(StatusCode::OK, &json!({ "ok": true }))
}

async fn state(State(sim): State<Sim>) -> Response {
    // Counting used blocks reads the image files' metadata.
    let dump = tokio::task::spawn_blocking(move || sim.dump()).await.unwrap_or_default();
    answer(StatusCode::OK, &dump)
}

/// The calls that were answered 501, and how often each came.
async fn unmodelled(State(sim): State<Sim>) -> Response {
    answer(StatusCode::OK, &sim.read(|state| json!(state.unmodelled)))
}

async fn clear_unmodelled(State(sim): State<Sim>) -> Response {
    sim.change(|state| state.unmodelled.clear());
    sim.save().await;
    answer(StatusCode::OK, &json!({ "ok": true }))
}

async fn log(State(sim): State<Sim>) -> Response {
    answer(StatusCode::OK, &json!(sim.log()))
}

async fn clear_log(State(sim): State<Sim>) -> Response {
    sim.clear_log();
    answer(StatusCode::OK, &json!({ "ok": true }))
}
