//! What is between a controller and Proxmox: requests get lost here, and each that changes something is judged before it goes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use proxmox_csi::{
    pve::transport::{HttpRequest, HttpResponse, Transport, TransportError, boxed},
    sim::faults::Fault,
};
use tokio::time::{Instant, sleep};
use tower::ServiceExt as _;

use crate::{judge, plan::Cut, rig::Rig, support::in_process};

/// The wire of one controller.
pub fn wire(rig: &Rig, controller: u32, alive: &Arc<AtomicBool>) -> Transport {
    let (rig, alive, proxmox) = (rig.clone(), Arc::clone(alive), in_process(&rig.sim));
    boxed(tower::service_fn(move |request: HttpRequest| {
        let (rig, alive, proxmox) = (rig.clone(), Arc::clone(&alive), proxmox.clone());
        async move { send(&rig, controller, &alive, proxmox, request).await }
    }))
}

fn lost() -> TransportError {
    TransportError::MaybeSent("cut".to_owned())
}

fn refused(status: u16, reason: &'static [u8]) -> HttpResponse {
    let mut response = http::Response::new(Bytes::from_static(b"{\"data\":null}"));
    *response.status_mut() = http::StatusCode::from_u16(status).expect("a status");
    response.extensions_mut().insert(hyper::ext::ReasonPhrase::from_static(reason));
    response
}

/// What is to happen to this request.
fn cut_of(rig: &Rig, writes: bool) -> Option<Cut> {
    let mut ledger = rig.ledger();
    if let Some(chaos) = &mut ledger.chaos {
        if chaos.until <= Instant::now() {
            ledger.chaos = None;
        } else if chaos.chance.percent(chaos.percent) {
            return Some(if chaos.chance.percent(50) { Cut::LoseRequest } else { Cut::LoseAnswer });
        }
    }
    let at = ledger.cuts.iter().position(|armed| writes || !armed.writes)?;
    let armed = &mut ledger.cuts[at];
    if armed.skip > 0 {
        armed.skip -= 1;
        return None;
    }
    Some(ledger.cuts.remove(at).cut)
}

async fn send(
    rig: &Rig,
    controller: u32,
    alive: &AtomicBool,
    proxmox: Transport,
    request: HttpRequest,
) -> Result<HttpResponse, TransportError> {
    if !alive.load(Ordering::Relaxed) {
        return Err(TransportError::NotSent("the process is gone".to_owned()));
    }
    let writes = request.method() != http::Method::GET;
    let cut = cut_of(rig, writes);
    let name = {
        let mut ledger = rig.ledger();
        ledger.requests += 1;
        let name = format!("{} {}", request.method(), request.uri());
        ledger.mix(name.as_bytes());
        ledger.mix(request.body());
        name
    };
    let body = String::from_utf8_lossy(request.body()).into_owned();
    let shown = writes.then(|| readable(&name, &body));
    if writes {
        judge::write(rig, controller, &request);
    }
    let answer = deliver(rig, cut, proxmox, request).await;
    let mut ledger = rig.ledger();
    match &answer {
        Ok(response) => {
            ledger.mix(response.body());
            ledger.mix(&response.status().as_u16().to_le_bytes());
        }
        Err(error) => ledger.mix(error.to_string().as_bytes()),
    }
    if let Some(shown) = shown {
        let cut = cut.map_or_else(String::new, |cut| format!(" [{cut:?}]"));
        let said = match &answer {
            Ok(response) if response.status().is_success() => "OK".to_owned(),
            Ok(response) => {
                let text = String::from_utf8_lossy(response.body()).into_owned();
                format!("{} {}", response.status().as_u16(), text.trim())
            }
            Err(error) => error.to_string(),
        };
        ledger.say(&format!("  c{controller} {shown}{cut} -> {said}"));
    } else if let (Some(cut), Ok(_) | Err(_)) = (cut, &answer) {
        ledger.say(&format!("  c{controller} {name} [{cut:?}]"));
    }
    answer
}

/// A request as people read it.
fn readable(name: &str, body: &str) -> String {
    let name = name.replace("/api2/json", "");
    let text = if body.is_empty() { name } else { format!("{name} {body}") };
    percent_encoding::percent_decode_str(&text).decode_utf8_lossy().into_owned()
}

async fn deliver(
    rig: &Rig,
    cut: Option<Cut>,
    proxmox: Transport,
    request: HttpRequest,
) -> Result<HttpResponse, TransportError> {
    match cut {
        None => proxmox.oneshot(request).await,
        Some(Cut::NotSent) => Err(TransportError::NotSent("cut".to_owned())),
        Some(Cut::LoseRequest) => Err(lost()),
        Some(Cut::LoseAnswer) => {
            proxmox.oneshot(request).await.map_err(|_| lost())?;
            Err(lost())
        }
        Some(Cut::Late(seconds)) => {
            let rig = rig.clone();
            tokio::spawn(async move {
                sleep(Duration::from_secs(seconds.into())).await;
                let touch = rig.ledger().touch(judge::vm_of(&request), None);
                rig.ledger().say("  a late request arrives");
                proxmox.oneshot(request).await.ok();
                sleep(Duration::from_secs(12)).await;
                rig.ledger().touched(touch);
            });
            Err(lost())
        }
        Some(Cut::Deadline) => {
            proxmox.oneshot(request).await.map_err(|_| lost())?;
            sleep(Duration::from_secs(35)).await;
            Err(TransportError::Deadline(Duration::from_secs(35)))
        }
        Some(Cut::Refuse500) => Ok(refused(500, b"Connection refused")),
        Some(Cut::Unreachable595) => Ok(refused(595, b"Connection timed out")),
        Some(cut @ (Cut::FailTask | Cut::FailTaskAfter)) => {
            if let Some(worker) = worker(&request) {
                let text = "command 'x' failed: got signal 9".to_owned();
                let after = cut == Cut::FailTaskAfter;
                let fault = Fault::FailTask { worker: worker.to_owned(), text, after, times: 1 };
                rig.sim.inject(fault).expect("it waits for its task");
            }
            proxmox.oneshot(request).await
        }
    }
}

/// The worker of the task that a request starts.
fn worker(request: &HttpRequest) -> Option<&'static str> {
    let path = request.uri().path();
    match request.method().as_str() {
        "POST" if path.ends_with("/config") => Some("qmconfig"),
        "PUT" if path.ends_with("/resize") => Some("resize"),
        "DELETE" if path.contains("/content/") => Some("imgdel"),
        "POST" if path.ends_with("/qemu") => Some("qmcreate"),
        "DELETE" if path.contains("/qemu/") => Some("qmdestroy"),
        _ => None,
    }
}
