//! The status page at `/_sim/`: what the cluster is now, for a person. The server renders all of it; a few lines of
//! script put a fresh rendering in place every second. Every text is escaped, and the page's policy lets nothing run
//! but these lines.

mod picture;
mod tables;

use crate::sim::Sim;
use askama::Template;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use picture::{Box, Edge, Picture};

/// The frame around what changes.
#[derive(Template)]
#[template(path = "sim/page.html")]
struct Page {
    live: Frame,
    nonce: String,
}

struct Frame {
    cluster: String,
    version: &'static str,
    html: String,
}

/// What changes.
#[derive(Template)]
#[template(path = "sim/live.html")]
struct Live {
    nodes: Vec<tables::Node>,
    quorate: bool,
    edges: Vec<Edge>,
    boxes_left: Vec<Box>,
    boxes_right: Vec<Box>,
    height: u32,
    left_out: usize,
    vms: Vec<tables::Vm>,
    storages: Vec<tables::Storage>,
    volumes: Vec<tables::Volume>,
    volume_count: usize,
    tasks: Vec<tables::Task>,
    unmodelled: Vec<tables::Unmodelled>,
    unmodelled_count: u64,
    faults: Vec<String>,
}

fn render(sim: &Sim) -> Result<String, askama::Error> {
    let live = sim.read(|state| {
        let Picture { edges, left, right, height, left_out } = Picture::of(state);
        Live {
            nodes: tables::nodes(state),
            quorate: state.has_quorum(),
            edges,
            boxes_left: left,
            boxes_right: right,
            height,
            left_out,
            vms: tables::vms(state),
            storages: tables::storages(state),
            volumes: tables::volumes(state),
            volume_count: state.volumes.len(),
            tasks: tables::tasks(state),
            unmodelled: tables::unmodelled(state),
            unmodelled_count: state.unmodelled.values().sum(),
            faults: tables::faults(state),
        }
    });
    live.render()
}

/// Nothing of elsewhere, and no script but the page's own.
fn policy(nonce: &str) -> String {
    format!(
        "default-src 'none'; connect-src 'self'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}

fn answer(rendered: Result<String, askama::Error>, policy: String) -> Response {
    match rendered {
        Ok(html) => {
            let headers = [
                (header::CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
                (header::CONTENT_SECURITY_POLICY, policy),
                (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
            ];
            (headers, html).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "cannot render the status page");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn off_the_runtime(sim: Sim) -> Result<String, askama::Error> {
    // How much volumes take is asked of their files.
    tokio::task::spawn_blocking(move || render(&sim)).await.unwrap_or(Err(askama::Error::Fmt))
}

/// `GET /_sim/`
pub(super) async fn page(State(sim): State<Sim>) -> Response {
    let nonce = uuid::Uuid::new_v4().simple().to_string();
    let (cluster, version) = sim.read(|state| (state.cluster.clone(), state.version.release()));
    let rendered = off_the_runtime(sim).await.and_then(|html| {
        let cluster = if cluster.is_empty() { "one node".to_owned() } else { cluster };
        Page { live: Frame { cluster, version, html }, nonce: nonce.clone() }.render()
    });
    answer(rendered, policy(&nonce))
}

/// `GET /_sim/live`: what changes of the page.
pub(super) async fn live(State(sim): State<Sim>) -> Response {
    answer(off_the_runtime(sim).await, policy("none"))
}

/// `GET /_sim`
pub(super) async fn to_page() -> Redirect {
    Redirect::permanent("/_sim/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::World;

    #[tokio::test]
    async fn what_a_vm_is_called_is_text_and_never_markup() {
        let world = World::from_yaml(
            "nodes: [pve1]\nstorages: [{id: local}]\nvms:\n- {vmid: 100, node: pve1, name: w1, config: {name: \"<script>alert(1)</script>\"}}\ntokens: []\n",
        );
        let sim = Sim::in_memory(world.expect("the file is well formed")).expect("the world can be made");
        let html = render(&sim).expect("it renders");
        assert!(html.contains("&#60;script&#62;alert(1)"), "{html}");
        assert!(!html.contains("<script"));
    }

    #[tokio::test]
    async fn a_disk_is_a_line_from_its_vm_to_its_volume() {
        let sim = Sim::in_memory(World::builtin()).expect("the world can be made");
        let picture = sim.read(Picture::of);
        assert_eq!((picture.edges.len(), picture.left.len(), picture.right.len()), (3, 3, 3));
        assert!(picture.edges.iter().all(|edge| edge.class.is_empty()), "config and QEMU agree");
        sim.stop_vm(101).await;
        let picture = sim.read(Picture::of);
        let stopped: Vec<&str> = picture.edges.iter().map(|edge| edge.class).collect();
        assert_eq!(stopped, ["config", "", ""]);
    }
}
