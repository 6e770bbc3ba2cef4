//! A stateful API server in process: what `kube::Client::new` talks to instead of a cluster.
//!
//! It keeps objects as JSON with one resourceVersion over all, answers list, watch (with bookmarks and 410), get, create, replace,
//! patch (merge and server-side apply with field ownership of labels and annotations) and delete with preconditions, and can be told to
//! fail, to lag and to forget. Only what a real one does too: conflicts, immutability of providerID, dry run, 403 for what no role allows.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::body::Frame;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};

use rights::Right;

#[path = "rights.rs"]
pub mod rights;

type Reply = Response<BoxBody<Bytes, std::convert::Infallible>>;

/// The server; clones are handles to the same one.
#[derive(Clone, Default)]
pub struct ApiServer(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// By collection path, then name.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    /// Every change: version, collection, kind of change, object.
    history: VecDeque<(u64, String, &'static str, Value)>,
    /// History before this version is forgotten: watches from there are answered 410.
    compacted: u64,
    version: u64,
    /// Ends every open watch.
    watch_epoch: u64,
    down: bool,
    /// How much later watches hear of a change.
    lag: Duration,
    /// Every so many writes are answered with a conflict, as if somebody else had been faster; 0 for none.
    conflict_every: u64,
    tried: u64,
    /// Whether events are refused.
    deaf: bool,
    log: Vec<String>,
    requests: u64,
    rights: Option<BTreeSet<Right>>,
    used: BTreeSet<Right>,
    breaches: Vec<Right>,
    on_write: Option<OnWrite>,
}

/// A change of an object.
pub struct Change<'a> {
    pub collection: &'a str,
    pub name: &'a str,
    /// It is gone.
    pub deleted: bool,
    pub old: Option<&'a Value>,
    pub new: &'a Value,
}

/// Called for each change a client makes, at the moment it is made.
pub type OnWrite = Arc<dyn Fn(&Change<'_>) + Send + Sync>;

/// How many changes are remembered for watches.
const REMEMBERED: usize = 500;
/// How many events are kept.
const EVENTS: usize = 2000;

impl ApiServer {
    /// A client of this server.
    pub fn client(&self) -> kube::Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move { server.answer(request).await }
        });
        kube::Client::new(service, "kube-system")
    }

    /// Serves over plain HTTP on a free port of this machine, until the runtime ends.
    pub async fn listen(&self) -> std::net::SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let server = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = server.clone();
                let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                    let server = server.clone();
                    async move {
                        let (parts, body) = request.into_parts();
                        let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
                        server.answer(Request::from_parts(parts, Body::from(body.to_vec()))).await
                    }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(hyper_util::rt::TokioIo::new(stream), service);
                tokio::spawn(connection);
            }
        });
        address
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no panic under the lock")
    }

    /// Puts an object there, as if somebody had written it.
    pub fn put(&self, collection: &str, object: Value) {
        let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
        let mut state = self.lock();
        let known = state.object(collection, &name).is_some();
        state.write(collection, &name, object, if known { "MODIFIED" } else { "ADDED" });
        drop(state);
        self.0.changed.notify_waiters();
    }

    /// Takes an object away, as if somebody had deleted it; nobody judges that.
    pub fn take(&self, collection: &str, name: &str) {
        let mut state = self.lock();
        let judge = state.on_write.take();
        if let Some(old) = state.object(collection, name).cloned() {
            state.write(collection, name, old, "DELETED");
        }
        state.on_write = judge;
        drop(state);
        self.0.changed.notify_waiters();
    }

    /// Changes an object in place.
    pub fn edit(&self, collection: &str, name: &str, edit: impl FnOnce(&mut Value)) {
        let mut object = self.get(collection, name).expect("an object to edit");
        edit(&mut object);
        self.put(collection, object);
    }

    /// An object.
    pub fn get(&self, collection: &str, name: &str) -> Option<Value> {
        self.lock().object(collection, name).cloned()
    }

    /// The names of a collection.
    pub fn names(&self, collection: &str) -> Vec<String> {
        self.lock().objects.get(collection).map(|all| all.keys().cloned().collect()).unwrap_or_default()
    }

    /// The reasons of all events about an object.
    pub fn events_about(&self, name: &str) -> BTreeSet<String> {
        let state = self.lock();
        let events = state.objects.get("/apis/events.k8s.io/v1/namespaces/default/events");
        let about = events.into_iter().flat_map(BTreeMap::values).filter(|e| e["regarding"]["name"] == name);
        about.filter_map(|event| event["reason"].as_str().map(str::to_owned)).collect()
    }

    /// Allows only what these roles do; whatever else is asked for is answered 403, and is a breach.
    pub fn allow(&self, roles: &str) {
        self.lock().rights = Some(rights::rights(roles));
    }

    /// What was asked for and not allowed.
    pub fn breaches(&self) -> Vec<Right> {
        self.lock().breaches.clone()
    }

    /// The rights that were used.
    pub fn used(&self) -> BTreeSet<Right> {
        self.lock().used.clone()
    }

    /// How many requests there were.
    pub fn requests(&self) -> u64 {
        self.lock().requests
    }

    /// Lets watches hear of changes so much later.
    pub fn set_lag(&self, lag: Duration) {
        self.lock().lag = lag;
    }

    /// Answers every `n`th write with a conflict; 0 for none.
    pub fn conflict_every(&self, n: u64) {
        self.lock().conflict_every = n;
    }

    /// Calls this for each change that a client makes.
    pub fn on_write(&self, tell: OnWrite) {
        self.lock().on_write = Some(tell);
    }

    /// How many events there are about an object for each reason.
    pub fn events_by_reason(&self, name: &str) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        let state = self.lock();
        let events = state.objects.get("/apis/events.k8s.io/v1/namespaces/default/events");
        let about = events.into_iter().flat_map(BTreeMap::values).filter(|e| e["regarding"]["name"] == name);
        for reason in about.filter_map(|event| event["reason"].as_str()) {
            *counts.entry(reason.to_owned()).or_default() += 1;
        }
        counts
    }

    /// The notes of the events about an object that have this reason.
    pub fn notes(&self, name: &str, reason: &str) -> Vec<String> {
        let state = self.lock();
        let events = state.objects.get("/apis/events.k8s.io/v1/namespaces/default/events");
        let about = events.into_iter().flat_map(BTreeMap::values);
        about
            .filter(|event| event["regarding"]["name"] == name && event["reason"] == reason)
            .filter_map(|event| event["note"].as_str().map(str::to_owned))
            .collect()
    }

    /// Every event that was written: namespace, kind and name of what it is about, reason and note.
    pub fn events(&self) -> Vec<[String; 5]> {
        let state = self.lock();
        let all = state.objects.iter().filter(|(path, _)| path.ends_with("/events"));
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let row = |event: &Value| {
            let about = &event["regarding"];
            assert_eq!(event["metadata"]["namespace"], *about.get("namespace").unwrap_or(&json!("default")));
            [
                text(&event["metadata"]["namespace"]),
                text(&about["kind"]),
                text(&about["name"]),
                text(&event["reason"]),
                text(&event["note"]),
            ]
        };
        all.flat_map(|(_, events)| events.values().map(row)).collect()
    }

    /// Whether events are refused.
    pub fn refuse_events(&self, refuse: bool) {
        self.lock().deaf = refuse;
    }

    /// Whether every request fails.
    pub fn set_down(&self, down: bool) {
        self.lock().down = down;
        self.end_watches();
    }

    /// Ends the open watches and forgets what they could go on from.
    pub fn compact(&self) {
        let mut state = self.lock();
        state.compacted = state.version;
        state.history.clear();
        drop(state);
        self.end_watches();
    }

    /// Ends the open watches.
    pub fn end_watches(&self) {
        self.lock().watch_epoch += 1;
        self.0.changed.notify_waiters();
    }

    /// `METHOD path` of every write since the last call.
    pub fn writes(&self) -> Vec<String> {
        let mut state = self.lock();
        let log = std::mem::take(&mut state.log);
        log.into_iter().filter(|line| !line.contains("/events")).collect()
    }

    async fn answer(&self, request: Request<Body>) -> Result<Reply, std::io::Error> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
        let path = parts.uri.path().to_owned();
        let query: BTreeMap<String, String> = parts
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        {
            let mut state = self.lock();
            if state.down {
                return Err(std::io::Error::other("connection refused"));
            }
            state.requests += 1;
            let is_write = parts.method != Method::GET;
            if is_write {
                state.log.push(format!("{} {path}", parts.method));
            }
            let done = rights::of(&parts.method, &path, &query);
            if let Some(rights) = &state.rights {
                let Some(right) = rights::covering(rights, &done).cloned() else {
                    let text = format!("forbidden: {done:?}");
                    state.breaches.push(done);
                    return Ok(failure(403, "Forbidden", &text));
                };
                state.used.insert(right);
            }
            if is_write && !path.ends_with("/events") && state.conflict_every > 0 {
                state.tried += 1;
                if state.tried.is_multiple_of(state.conflict_every) {
                    return Ok(failure(409, "Conflict", "somebody else was faster"));
                }
            }
        }
        if parts.method == Method::GET && query.get("watch").is_some_and(|on| on == "true" || on == "1") {
            return Ok(self.watch(&path, &query));
        }
        let kind = parts.headers.get("content-type").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let json: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let result = self.lock().perform(&parts.method, &path, &query, kind, json);
        if parts.method != Method::GET {
            self.0.changed.notify_waiters();
        }
        Ok(match result {
            Ok(value) => reply(200, &value),
            Err((code, reason, message)) => failure(code, reason, &message),
        })
    }

    fn watch(&self, collection: &str, query: &BTreeMap<String, String>) -> Reply {
        let mut from: u64 = query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
        let bookmarks = query.get("allowWatchBookmarks").is_some_and(|on| on == "true");
        let (sender, receiver) = mpsc::unbounded_channel::<Result<Frame<Bytes>, std::convert::Infallible>>();
        let (server, collection) = (self.clone(), collection.to_owned());
        let (epoch, lag) = {
            let state = self.lock();
            (state.watch_epoch, state.lag)
        };
        tokio::spawn(async move {
            let say = |kind: &str, object: &Value| {
                let line = format!("{}\n", json!({"type": kind, "object": object}));
                sender.send(Ok(Frame::data(Bytes::from(line)))).is_ok()
            };
            loop {
                let waiting = server.0.changed.notified();
                tokio::pin!(waiting);
                waiting.as_mut().enable();
                if !lag.is_zero() {
                    tokio::time::sleep(lag).await;
                }
                let (news, ended, gone, version) = {
                    let state = server.lock();
                    let first = state.history.partition_point(|(at, ..)| *at <= from);
                    let news: Vec<_> = state
                        .history
                        .iter()
                        .skip(first)
                        .filter(|(_, of, ..)| *of == collection)
                        .map(|(_, _, kind, object)| (*kind, object.clone()))
                        .collect();
                    (news, state.watch_epoch != epoch, from < state.compacted, state.version)
                };
                if gone {
                    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410,
                        "reason": "Expired", "message": "too old resource version"});
                    say("ERROR", &status);
                    return;
                }
                if !news.iter().all(|(kind, object)| say(kind, object)) || ended {
                    return;
                }
                if bookmarks && version > from {
                    let kind = json!({"kind": "Node", "apiVersion": "v1",
                        "metadata": {"resourceVersion": version.to_string()}});
                    if !say("BOOKMARK", &kind) {
                        return;
                    }
                }
                from = version;
                waiting.await;
            }
        });
        let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|frame| (frame, receiver))
        });
        Response::new(BodyExt::boxed(SyncBody::new(StreamBody::new(stream))))
    }
}

/// `BoxBody` asks for `Sync`, which a stream of a receiver is not by its type; nothing shares it.
type SyncBody<B> = sync_body::SyncBody<B>;

mod sync_body {
    use std::{
        pin::Pin,
        sync::{Mutex, PoisonError},
        task::{Context, Poll},
    };

    use hyper::body::{Body, Frame};

    pub struct SyncBody<B>(Mutex<Pin<Box<B>>>);

    impl<B> SyncBody<B> {
        pub fn new(body: B) -> Self {
            Self(Mutex::new(Box::pin(body)))
        }
    }

    impl<B: Body> Body for SyncBody<B> {
        type Data = B::Data;
        type Error = B::Error;

        fn poll_frame(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut().poll_frame(cx)
        }
    }
}

type Failure = (u16, &'static str, String);

fn reply(code: u16, value: &Value) -> Reply {
    let answer = Response::builder().status(code).header("content-type", "application/json");
    let body = http_body_util::Full::new(Bytes::from(value.to_string())).boxed();
    answer.body(body).expect("a status and a header that are legal")
}

fn failure(code: u16, reason: &str, message: &str) -> Reply {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
        "reason": reason, "message": message});
    reply(code, &status)
}

impl State {
    fn object(&self, collection: &str, name: &str) -> Option<&Value> {
        self.objects.get(collection)?.get(name)
    }

    fn write(&mut self, collection: &str, name: &str, mut object: Value, kind: &'static str) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-{}-{name}", self.version));
        }
        if let Some(tell) = self.on_write.clone() {
            let old = self.object(collection, name).cloned();
            let deleted = kind == "DELETED";
            tell(&Change { collection, name, deleted, old: old.as_ref(), new: &object });
        }
        if kind == "DELETED" {
            self.objects.entry(collection.to_owned()).or_default().remove(name);
        } else {
            self.objects.entry(collection.to_owned()).or_default().insert(name.to_owned(), object.clone());
        }
        self.history.push_back((self.version, collection.to_owned(), kind, object.clone()));
        if self.history.len() > REMEMBERED
            && let Some((version, ..)) = self.history.pop_front()
        {
            self.compacted = self.compacted.max(version);
        }
        if collection.ends_with("/events")
            && let Some(events) = self.objects.get_mut(collection)
            && events.len() > EVENTS
        {
            // Their names are random: any will do.
            events.pop_first();
        }
        object
    }

    fn perform(
        &mut self,
        method: &Method,
        path: &str,
        query: &BTreeMap<String, String>,
        kind: &str,
        body: Value,
    ) -> Result<Value, Failure> {
        let (path, status_only) = match path.strip_suffix("/status") {
            Some(path) => (path, true),
            None => (path, false),
        };
        if self.deaf && path.ends_with("/events") {
            return Err((403, "Forbidden", "events may not be written".to_owned()));
        }
        let dry = query.contains_key("dryRun");
        let collections = [
            "/nodes",
            "/leases",
            "/events",
            "/volumeattachments",
            "/persistentvolumes",
            "/volumeattributesclasses",
            "/pods",
            "/csinodes",
            "/storageclasses",
        ];
        let is_collection = collections.iter().any(|end| path.ends_with(end));
        if is_collection {
            return match *method {
                Method::GET => {
                    let items: Vec<&Value> =
                        self.objects.get(path).into_iter().flat_map(|all| all.values()).collect();
                    let number = |key: &str| query.get(key).and_then(|value| value.parse::<usize>().ok());
                    let end = number("continue").unwrap_or(0);
                    let rest = items.get(end..).unwrap_or_default();
                    let page = &rest[..rest.len().min(number("limit").unwrap_or(usize::MAX))];
                    let mut metadata = json!({"resourceVersion": self.version.to_string()});
                    if page.len() < rest.len() {
                        metadata["continue"] = json!((end + page.len()).to_string());
                    }
                    Ok(json!({"kind": "List", "apiVersion": "v1", "items": page, "metadata": metadata}))
                }
                Method::POST => {
                    let name = body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                    if self.object(path, &name).is_some() {
                        return Err((409, "AlreadyExists", format!("`{name}` already exists")));
                    }
                    Ok(self.write(path, &name, body, "ADDED"))
                }
                _ => Err((405, "MethodNotAllowed", String::new())),
            };
        }
        let (collection, name) = path.rsplit_once('/').ok_or((404, "NotFound", path.to_owned()))?;
        let old =
            self.object(collection, name).cloned().ok_or((404, "NotFound", format!("`{name}` not found")))?;
        let conflict = || (409, "Conflict", format!("`{name}` has been modified"));
        let stale = |version: &Value| version.is_string() && *version != old["metadata"]["resourceVersion"];
        match *method {
            Method::GET => Ok(old),
            Method::PUT => {
                if stale(&body["metadata"]["resourceVersion"]) {
                    return Err(conflict());
                }
                Ok(self.write(collection, name, body, "MODIFIED"))
            }
            Method::DELETE => {
                let conditions = &body["preconditions"];
                let other_uid = conditions["uid"].is_string() && conditions["uid"] != old["metadata"]["uid"];
                if other_uid || stale(&conditions["resourceVersion"]) {
                    return Err(conflict());
                }
                if dry { Ok(old) } else { Ok(self.write(collection, name, old, "DELETED")) }
            }
            Method::PATCH => {
                if stale(&body["metadata"]["resourceVersion"]) {
                    return Err(conflict());
                }
                let mut new = old.clone();
                if kind.contains("apply") {
                    let manager = query.get("fieldManager").cloned().unwrap_or_default();
                    apply(&mut new, &body, &manager);
                } else if status_only {
                    merge(&mut new["status"], &body["status"]);
                } else {
                    let mut body = body;
                    body.as_object_mut().map(|body| body.remove("status"));
                    merge(&mut new, &body);
                }
                let provider =
                    |node: &Value| node["spec"]["providerID"].as_str().unwrap_or_default().to_owned();
                if !provider(&old).is_empty() && provider(&old) != provider(&new) {
                    return Err((
                        422,
                        "Invalid",
                        "node updates may not change providerID except from \"\" to valid".into(),
                    ));
                }
                if dry || new == old { Ok(new) } else { Ok(self.write(collection, name, new, "MODIFIED")) }
            }
            _ => Err((405, "MethodNotAllowed", String::new())),
        }
    }
}

/// RFC 7396.
fn merge(into: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            into.as_object_mut().expect("made one above").remove(key);
        } else {
            merge(&mut into[key], value);
        }
    }
}

/// Server-side apply of labels and annotations: what a manager applied before and leaves out now goes, if it owns it.
fn apply(object: &mut Value, body: &Value, manager: &str) {
    for map in ["labels", "annotations"] {
        let wanted = body["metadata"][map].as_object().cloned().unwrap_or_default();
        let owned = object["fakeOwners"][manager][map].as_object().cloned().unwrap_or_default();
        for key in owned.keys().filter(|key| !wanted.contains_key(*key)) {
            object["metadata"][map].as_object_mut().map(|map| map.remove(key));
        }
        for (key, value) in &wanted {
            object["metadata"][map][key] = value.clone();
        }
        object["fakeOwners"][manager][map] = wanted.into_iter().map(|(key, _)| (key, json!(true))).collect();
    }
}
