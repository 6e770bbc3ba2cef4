//! Sends a transcript to a simulator, record by record.

use super::compare::Comparison;
use super::ids::Ids;
use super::record::{Record, Request, Response};
use super::script::{Script, Sending, Step, Unrecorded, form_text};
use crate::sim::clock::Profile;
use crate::sim::locks::Held;
use crate::sim::world::World;
use crate::sim::{Options, Sim, StartError, UnknownTarget};
use axum::body::Body;
use http::header::{AUTHORIZATION, CONTENT_TYPE, COOKIE};
use hyper::ext::ReasonPhrase;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tower::ServiceExt as _;

/// How a record went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The answers say the same.
    Equal,
    /// They differ; one line per difference.
    Different(Vec<String>),
    /// They may differ, for this reason.
    Excepted(String),
}

/// One record and its verdict.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Place in the recording.
    pub seq: u32,
    /// Name of the record.
    pub name: String,
    /// Its group.
    pub group: String,
    /// The verdict.
    pub verdict: Verdict,
}

/// Why a transcript cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// There is no world for the first record.
    #[error("there is no built-in world for record {0}; one is given with --world")]
    NoWorld(u32),
    /// A world does not start.
    #[error("the world of record {0} does not start")]
    Start(u32, #[source] StartError),
    /// A VM of the script cannot be added.
    #[error("a step before record {0} cannot be done")]
    Vm(u32, #[source] StartError),
    /// A fault of the script names something that is not there.
    #[error("a step before record {0} cannot be done")]
    Fault(u32, #[source] UnknownTarget),
    /// A step of the script fails.
    #[error("a step before record {0} cannot be done: {1}")]
    Step(u32, String),
}

/// How long a task may take before the next record is sent.
const PATIENCE: Duration = Duration::from_mins(1);

/// The simulator of a group and what is known of it.
struct Stage {
    sim: Sim,
    world: World,
    ids: Ids,
    held: Vec<Held>,
}

/// Sends every record in order and compares the answers. Must run in a tokio runtime; with a paused clock it takes no
/// time.
pub async fn replay(records: &[Record], script: &Script) -> Result<Vec<Outcome>, ReplayError> {
    let mut outcomes = Vec::new();
    let mut stage: Option<Stage> = None;
    let mut done = None;
    let mut last = 0;
    for record in records {
        let due = script.worlds.range(..=record.seq).next_back();
        if let Some((from, world)) = due
            && done != Some(*from)
        {
            let options = Options { time: Profile::None, ..Options::default() };
            let sim =
                Sim::start(world.clone(), options).map_err(|error| ReplayError::Start(record.seq, error))?;
            sim.change(|state| state.misreading = script.misreading);
            stage = Some(Stage { sim, world: world.clone(), ids: Ids::default(), held: Vec::new() });
            done = Some(*from);
            last = *from;
        }
        let stage = stage.as_mut().ok_or(ReplayError::NoWorld(record.seq))?;
        for step in script.before.range(last..=record.seq).flat_map(|(_, steps)| steps) {
            stage.step(record.seq, step).await?;
        }
        last = record.seq + 1;
        let (Some(request), Some(recorded)) = (&record.request, &record.response) else { continue };
        let plain = Sending::default();
        let sending = script.send.get(&record.seq).unwrap_or(&plain);
        let differences = stage.play(request, recorded, sending).await;
        let verdict = match script.except.get(&record.seq) {
            Some(reason) => Verdict::Excepted(reason.clone()),
            None if differences.is_empty() => Verdict::Equal,
            None => Verdict::Different(differences),
        };
        outcomes.push(Outcome { seq: record.seq, name: record.name.clone(), group: record.group(), verdict });
    }
    Ok(outcomes)
}

impl Stage {
    async fn play(&mut self, request: &Request, recorded: &Response, sending: &Sending) -> Vec<String> {
        let ours = match request.path.strip_suffix("/status+log") {
            Some(task) => self.whole_task(task, request, sending).await,
            None => self.send(request, sending).await,
        };
        if let Some(upid) = ours.body["data"].as_str().filter(|text| text.starts_with("UPID:"))
            && !sending.leave
        {
            let _ = self.sim.wait_task(upid, PATIENCE).await;
        }
        Comparison::new(&mut self.ids).responses(recorded, &ours)
    }

    /// A task that the recorder waited for: exit status and the lines of the log.
    async fn whole_task(&self, task: &str, request: &Request, sending: &Sending) -> Response {
        let ask = |what: &str| Request { path: format!("{task}{what}"), ..request.clone() };
        let status = self.send(&ask("/status"), sending).await;
        let log = self.send(&ask("/log"), sending).await;
        let lines: Vec<Value> =
            log.body["data"].as_array().into_iter().flatten().map(|line| line["t"].clone()).collect();
        let exit = status.body["data"]["exitstatus"].clone();
        let body = if exit.is_null() { status.body } else { json!({ "exitstatus": exit, "log": lines }) };
        Response { status: status.status, reason: None, content_type: None, body }
    }

    fn authorization(&self, token: &str) -> String {
        let secret = self.world.token(token).map_or("unknown", |token| token.secret.as_str());
        format!("PVEAPIToken={token}={secret}")
    }

    async fn send(&self, request: &Request, sending: &Sending) -> Response {
        let path = self.ids.translate(&request.path);
        let mut form: BTreeMap<String, String> = request
            .form
            .iter()
            .flatten()
            .map(|(key, value)| (key.clone(), self.ids.translate(&form_text(value))))
            .collect();
        form.extend(sending.form.iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
        let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let pairs: Vec<String> =
            form.iter().map(|(key, value)| format!("{}={}", encode(key), encode(value))).collect();
        let (mut target, mut body) = (path, String::new());
        if matches!(request.method.as_str(), "GET" | "DELETE") && !pairs.is_empty() {
            target = format!("{target}?{}", pairs.join("&"));
        } else {
            body = pairs.join("&");
        }
        // A task's id may have characters that no address has.
        let target = target.replace('>', "%3E").replace(' ', "%20").replace('"', "%22");
        let mut builder = http::Request::builder().method(request.method.as_str()).uri(target);
        if let Some(json) = &sending.json {
            body = json!(json).to_string();
            builder = builder.header(CONTENT_TYPE, "application/json");
        } else {
            builder = builder.header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        }
        if let Some(authorization) = &sending.authorization {
            builder = builder.header(AUTHORIZATION, format!("PVEAPIToken={authorization}"));
        } else if let Some(user) = &sending.ticket {
            let ticket = self.sim.mint_ticket(user);
            builder = builder.header(COOKIE, format!("PVEAuthCookie={}", encode(&ticket)));
            match sending.csrf.as_deref() {
                Some("good") => builder = builder.header("CSRFPreventionToken", self.sim.mint_csrf(user)),
                Some(_) => builder = builder.header("CSRFPreventionToken", "00000000:bad"),
                None => {}
            }
        } else if let Some(token) = request.auth.as_deref().and_then(|auth| auth.strip_prefix("token ")) {
            builder = builder.header(AUTHORIZATION, self.authorization(token));
        }
        match builder.body(Body::from(body)) {
            Ok(request) => self.exchange(request).await,
            Err(error) => broken(&format!("the recorded request cannot be sent: {error}")),
        }
    }

    async fn exchange(&self, request: http::Request<Body>) -> Response {
        let response = match self.sim.router().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let status = response.status();
        let reason = response.extensions().get::<ReasonPhrase>().map_or_else(
            || status.canonical_reason().unwrap_or_default().to_owned(),
            |phrase| String::from_utf8_lossy(phrase.as_bytes()).into_owned(),
        );
        let content_type =
            response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let body = match axum::body::to_bytes(response.into_body(), usize::MAX).await {
            Ok(bytes) if bytes.is_empty() => Value::Null,
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or(Value::Null),
            Err(error) => return broken(&format!("the answer cannot be read: {error}")),
        };
        Response {
            status: status.as_u16(),
            reason: Some(reason),
            content_type: Some(json!(content_type)),
            body,
        }
    }

    async fn step(&mut self, seq: u32, step: &Step) -> Result<(), ReplayError> {
        let failed = |text: String| ReplayError::Step(seq, text);
        match step {
            Step::Call(call) => self.unrecorded(call).await.map_err(failed)?,
            Step::Fault(fault) => {
                self.sim.inject(fault.clone()).map_err(|error| ReplayError::Fault(seq, error))?;
            }
            Step::Later(seconds, fault) => {
                let (sim, seconds, fault) = (self.sim.clone(), *seconds, fault.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_secs(seconds)).await;
                    if let Err(error) = sim.inject(fault) {
                        tracing::error!(seq, %error, "a later step of the script cannot be done");
                    }
                });
            }
            Step::Vm(vm) => self.sim.add_vm(vm).map_err(|error| ReplayError::Vm(seq, error))?,
            Step::Forget(vmid) => drop(self.sim.forget_vm(*vmid)),
            Step::Move(vmid, node) => drop(self.sim.move_vm(*vmid, node)),
            Step::Power(vmid, true) => {
                self.sim.start_vm(*vmid).await.map_err(|error| failed(error.message().to_owned()))?;
            }
            Step::Power(vmid, false) => drop(self.sim.stop_vm(*vmid).await),
            Step::Volume(node, volid, size) => {
                self.sim.ensure_volume(node, volid, *size).map_err(|error| ReplayError::Vm(seq, error))?;
            }
            Step::Remove(node, volid) => self.sim.change(|state| {
                if let Ok(key) = state.volume_key(node, volid) {
                    state.volumes.remove(&key);
                }
            }),
            Step::Clear(storage) => self.sim.change(|state| {
                state.volumes.retain(|key, _| key.storage != *storage || key.owner() != 9999);
            }),
            Step::Hold(name) => {
                let held =
                    self.sim.locks().hold(name).await.map_err(|error| failed(error.message().to_owned()))?;
                self.held.push(held);
            }
            Step::Release => self.held.clear(),
            Step::Wait(seconds) => tokio::time::sleep(Duration::from_secs(*seconds)).await,
        }
        Ok(())
    }

    async fn unrecorded(&mut self, call: &Unrecorded) -> Result<(), String> {
        let (method, path) = call.to.split_once(' ').ok_or_else(|| format!("`{}` is no call", call.to))?;
        let token = call.token.clone().unwrap_or_else(|| "root@pam!csi".to_owned());
        let request = Request {
            method: method.to_owned(),
            path: format!("/api2/json{path}"),
            form: Some(call.form.iter().map(|(key, value)| (key.clone(), json!(value))).collect()),
            auth: Some(format!("token {token}")),
        };
        let answer = self.send(&request, &Sending::default()).await;
        if answer.status >= 400 && !call.fails {
            return Err(format!(
                "`{}` is answered {} {}",
                call.to,
                answer.status,
                answer.reason.unwrap_or_default()
            ));
        }
        if let Some(upid) = answer.body["data"].as_str().filter(|text| text.starts_with("UPID:")) {
            let _ = self.sim.wait_task(upid, PATIENCE).await;
            if let Some(recorded) = &call.upid {
                self.ids.bind(recorded, upid);
            }
        }
        Ok(())
    }
}

fn broken(text: &str) -> Response {
    Response { status: 0, reason: Some(text.to_owned()), content_type: None, body: Value::Null }
}
