//! The client of Proxmox: who it is, how often it asks, and what it says of it.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::join_all;
use proxmox_csi::{
    csi::proto::{self, controller_server::Controller as _},
    pve::{
        Client,
        transport::{HttpRequest, Transport, boxed},
    },
    sim::{Sim, World, faults::Fault},
    telemetry::metrics::Metrics,
    types::{Credentials, NodeName, VmId, credentials::Source},
    volume::Volumes,
};
use serde_json::json;
use support::{Bench, CSI, GIB, REGION, in_process, new_volume, nodes_of, settings};
use tokio::time::{Instant, sleep};
use tower::ServiceExt as _;

const USER: &str = "csi@pve";
const PASSWORD: &str = "the pass=word&";

/// A request as it left: method, path with query, headers and body.
#[derive(Debug, Clone)]
struct Seen {
    what: String,
    headers: String,
    body: String,
}

/// A simulator, what was sent to it, and files for credentials.
struct Rig {
    sim: Sim,
    seen: Arc<Mutex<Vec<Seen>>>,
    most: Arc<Mutex<BTreeMap<String, (usize, usize)>>>,
    directory: tempfile::TempDir,
    metrics: Metrics,
}

impl Rig {
    fn new() -> Self {
        let mut world = World::builtin();
        world.users.insert(USER.to_owned(), PASSWORD.to_owned());
        Self {
            sim: Sim::in_memory(world).expect("the world can be made"),
            seen: Arc::default(),
            most: Arc::default(),
            directory: tempfile::tempdir().expect("a directory"),
            metrics: Metrics::default(),
        }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    }

    fn transport(&self) -> Transport {
        let (inner, seen, most) = (in_process(&self.sim), Arc::clone(&self.seen), Arc::clone(&self.most));
        boxed(tower::service_fn(move |request: HttpRequest| {
            let (inner, most) = (inner.clone(), Arc::clone(&most));
            let headers = request.headers().iter();
            let headers: Vec<String> =
                headers.map(|(name, value)| format!("{name}: {}", value.to_str().expect("text"))).collect();
            let path = request.uri().path().to_owned();
            seen.lock().expect("no panic").push(Seen {
                what: format!("{} {}", request.method(), request.uri()),
                headers: headers.join("\n"),
                body: String::from_utf8(request.body().to_vec()).expect("text"),
            });
            async move {
                // How many are under way: of all, of a node, and of the same thing at a node.
                let node = path.split('/').nth(4).filter(|_| path.contains("/nodes/")).unwrap_or("none");
                let thing = path.split('/').nth(5).unwrap_or("none");
                let keys = ["all".to_owned(), format!("node {node}"), format!("{node} {thing}")];
                for key in &keys {
                    let mut most = most.lock().expect("no panic");
                    let (now, peak) = most.entry(key.clone()).or_default();
                    *now += 1;
                    *peak = (*peak).max(*now);
                }
                sleep(Duration::from_millis(20)).await;
                let answer = inner.oneshot(request).await;
                for key in &keys {
                    most.lock().expect("no panic").entry(key.clone()).or_default().0 -= 1;
                }
                answer
            }
        }))
    }

    fn client(&self, credentials: Credentials) -> Client {
        let region = REGION.parse().expect("a region");
        Client::with_credentials(region, self.transport(), credentials, self.metrics.clone())
            .expect("they can be read")
    }

    fn with_token_file(&self) -> (Client, PathBuf) {
        let secret = World::builtin().token(CSI).expect("the token").secret.clone();
        let path = self.file("secret", &format!("{secret}\n"));
        let credentials = Credentials::Token { id: Source::inline(CSI), secret: Source::File(path.clone()) };
        (self.client(credentials), path)
    }

    fn login(&self) -> Credentials {
        let password = Source::File(self.file("password", PASSWORD));
        Credentials::Login { username: Source::inline(USER), password }
    }

    /// Another secret for the token, as an administrator makes it.
    async fn rotate(&self) -> String {
        let path = "/access/users/csi@pve/token/csi";
        support::admin(&self.sim, "DELETE", path, "").await;
        let made = support::admin(&self.sim, "POST", path, "privsep=1").await;
        made["data"]["value"].as_str().expect("a secret").to_owned()
    }

    fn fault(&self, fault: serde_json::Value) {
        let fault: Fault = serde_json::from_value(fault).expect("a fault");
        self.sim.inject(fault).expect("a fault that fits the world");
    }

    /// How many answers of the simulator had this status.
    fn answers(&self, status: u16) -> usize {
        self.sim.log().iter().filter(|entry| entry.status == status).count()
    }

    fn logins(&self) -> usize {
        self.seen.lock().expect("no panic").iter().filter(|seen| seen.what.contains("/access/ticket")).count()
    }

    fn peak(&self, key: &str) -> usize {
        self.most.lock().expect("no panic").get(key).map_or(0, |(_, peak)| *peak)
    }
}

fn minutes(count: u64) -> Duration {
    Duration::from_secs(60 * count)
}

#[tokio::test(start_paused = true)]
async fn a_rotated_token_is_picked_up_when_the_old_one_is_refused() {
    let rig = Rig::new();
    let (client, path) = rig.with_token_file();
    client.resources().await.expect("an answer");
    std::fs::write(&path, rig.rotate().await).expect("a file");
    client.resources().await.expect("an answer, with the new secret");
    assert_eq!(rig.answers(401), 1);
    client.resources().await.expect("an answer");
    assert_eq!(rig.answers(401), 1);
    assert!(rig.metrics.render().contains("proxmox_api_credentials_reloads_total{region=\"test\"} 1"));
}

#[tokio::test(start_paused = true)]
async fn a_token_that_changed_in_its_file_is_used_before_the_old_one_is_refused() {
    let rig = Rig::new();
    let (client, path) = rig.with_token_file();
    client.resources().await.expect("an answer");
    std::fs::write(&path, rig.rotate().await).expect("a file");
    sleep(Duration::from_secs(11)).await;
    client.resources().await.expect("an answer");
    assert_eq!(rig.answers(401), 0);
    // A file that is away or empty for a moment changes nothing.
    std::fs::remove_file(&path).expect("it was there");
    sleep(Duration::from_secs(11)).await;
    client.resources().await.expect("an answer with what is known");
    std::fs::write(&path, "").expect("a file");
    sleep(Duration::from_secs(11)).await;
    client.resources().await.expect("an answer with what is known");
    assert_eq!(rig.answers(401), 0);
}

#[tokio::test(start_paused = true)]
async fn a_refused_token_is_sent_seldom_and_used_again_when_it_is_good_again() {
    let rig = Rig::new();
    let (client, _) = rig.with_token_file();
    rig.fault(json!({"fault": "expire_token", "token": CSI}));
    let started = Instant::now();
    let mut asked = 0;
    while started.elapsed() < minutes(5) {
        let error = client.resources().await.expect_err("it is refused");
        assert!(error.is_unauthenticated(), "{error}");
        asked += 1;
        sleep(Duration::from_millis(200)).await;
    }
    assert!(asked > 1000, "{asked}");
    assert!((10..20).contains(&rig.answers(401)), "{} in five minutes", rig.answers(401));
    rig.fault(json!({"fault": "expire_token", "token": CSI, "on": false}));
    sleep(Duration::from_secs(21)).await;
    client.resources().await.expect("an answer");
    client.resources().await.expect("an answer");
}

#[tokio::test(start_paused = true)]
async fn many_requests_share_one_login_and_its_renewal() {
    let rig = Rig::new();
    let client = rig.client(rig.login());
    let many = || join_all((0..10).map(|_| client.resources()));
    assert!(many().await.iter().all(Result::is_ok));
    assert_eq!(rig.logins(), 1);
    // Renewed in time for hours, by one login each.
    for hour in 1..=5 {
        for _ in 0..4 {
            sleep(minutes(15)).await;
            assert!(many().await.iter().all(Result::is_ok));
        }
        assert_eq!(rig.logins(), 1 + hour);
    }
    assert_eq!(rig.answers(401), 0);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_without_an_answer_leaves_the_old_ticket_in_use() {
    let rig = Rig::new();
    let client = rig.client(rig.login());
    client.resources().await.expect("an answer");
    rig.fault(
        json!({"fault": "refuse", "path": "/access/ticket", "status": 595, "text": "down", "times": 0}),
    );
    for _ in 0..4 {
        sleep(minutes(25)).await;
        client.resources().await.expect("the old ticket is good for two hours");
    }
    assert!((2..=5).contains(&rig.logins()), "{}", rig.logins());
    sleep(minutes(25)).await;
    assert!(client.resources().await.expect_err("no ticket any more").is_unknown());
    rig.sim.clear_faults();
    client.resources().await.expect("an answer");
}

#[tokio::test(start_paused = true)]
async fn a_ticket_that_is_refused_costs_one_login() {
    let rig = Rig::new();
    let client = rig.client(rig.login());
    client.resources().await.expect("an answer");
    sleep(minutes(5)).await;
    rig.fault(json!({"fault": "refuse", "path": "/cluster/resources", "status": 401,
        "text": "permission denied - invalid PVE ticket", "times": 1}));
    client.resources().await.expect("an answer, with a new ticket");
    assert_eq!(rig.logins(), 2);
    // One that is refused for ever costs no login for each request.
    rig.fault(json!({"fault": "refuse", "path": "/cluster/resources", "status": 401,
        "text": "permission denied - invalid PVE ticket", "times": 0}));
    for _ in 0..100 {
        assert!(client.resources().await.expect_err("it is refused").is_unauthenticated());
        sleep(Duration::from_millis(100)).await;
    }
    assert!(rig.logins() <= 6, "{}", rig.logins());
}

#[tokio::test(start_paused = true)]
async fn a_wrong_password_is_tried_seldom_and_a_right_one_at_once() {
    let rig = Rig::new();
    let path = rig.file("password", "wrong");
    let credentials =
        Credentials::Login { username: Source::inline(USER), password: Source::File(path.clone()) };
    let client = rig.client(credentials);
    for _ in 0..200 {
        let error = client.resources().await.expect_err("it is refused");
        assert!(
            error.is_unauthenticated() && error.to_string().contains("authentication failure"),
            "{error}"
        );
        sleep(Duration::from_millis(200)).await;
    }
    assert!(rig.logins() <= 6, "{} in forty seconds", rig.logins());
    let before = rig.logins();
    std::fs::write(&path, PASSWORD).expect("a file");
    client.resources().await.expect("an answer");
    assert_eq!(rig.logins(), before + 1);
}

#[tokio::test(start_paused = true)]
async fn p9_the_password_is_in_the_body_of_the_login_and_nowhere_else() {
    let rig = Rig::new();
    let client = rig.client(rig.login());
    let volumes = Volumes::new(vec![client.clone()], nodes_of(&rig.sim), settings());
    let bench = Bench::of(rig.sim.clone(), volumes);
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");

    let seen = rig.seen.lock().expect("no panic").clone();
    assert_eq!(rig.logins(), 1);
    let ticket = "PVEAuthCookie=";
    for Seen { what, headers, body } in seen {
        let login = what == "POST /api2/json/access/ticket";
        assert_eq!(body.contains("password=the%20pass%3Dword%26"), login, "{what}");
        assert!(!what.contains("pass") && !headers.contains("the pass") && !headers.contains("the%20pass"));
        assert_eq!(headers.contains(ticket), !login, "{what}");
        let changes = !what.starts_with("GET ") && !login;
        assert_eq!(headers.contains("csrfpreventiontoken"), changes, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn slow_calls_leave_the_workers_of_a_node_to_its_administrators() {
    let rig = Rig::new();
    let (client, _) = rig.with_token_file();
    let (pve1, pve2): (NodeName, NodeName) =
        ("pve1".parse().expect("a name"), "pve2".parse().expect("a name"));
    let storage = "shared".parse().expect("a storage");
    let vm = |id: u32| VmId::new(id).expect("a VMID");
    let (lists, reads) = tokio::join!(
        join_all((0..20).map(|turn| {
            let node = if turn % 2 == 0 { &pve1 } else { &pve2 };
            client.list_volumes(node, &storage)
        })),
        join_all((0..20).map(|_| client.vm_config(&pve1, vm(101)))),
    );
    assert!(lists.iter().all(Result::is_ok) && reads.iter().all(Result::is_ok));
    assert_eq!((rig.peak("pve1 storage"), rig.peak("pve2 storage")), (2, 2));
    assert!(rig.peak("node pve1") <= 4 && rig.peak("node pve2") <= 4);
    assert!((4..=6).contains(&rig.peak("all")), "{}", rig.peak("all"));
    let text = rig.metrics.render();
    assert!(
        text.contains("proxmox_api_requests_in_flight{region=\"test\",node=\"pve1\",class=\"slow\"} 0"),
        "{text}"
    );
    assert!(text.contains("proxmox_api_requests_total{class=\"slow\",outcome=\"ok\"} 20"), "{text}");
}

/// A volume from its making to its end, as far as it goes.
async fn life(bench: &Bench) -> Result<(), tonic::Status> {
    let volume = bench.create(new_volume("pvc-1", "shared")).await?.volume_id;
    bench.attach(&volume, "worker-101").await?;
    bench.expand(&volume, 2 * GIB).await?;
    bench.detach(&volume, "worker-101").await?;
    bench.delete(&volume).await?;
    // What is gone is proven to be gone.
    bench.delete(&volume).await?;
    let capacity = proto::GetCapacityRequest {
        parameters: BTreeMap::from([("storage".to_owned(), "shared".to_owned())]),
        ..Default::default()
    };
    let capacity = bench.controller.get_capacity(tonic::Request::new(capacity)).await?;
    assert!(capacity.into_inner().available_capacity > 0);
    Ok(())
}

const FIVE: [&str; 5] =
    ["Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit", "VM.Audit", "VM.Config.Disk"];

fn with_role(privileges: &[&str]) -> World {
    let mut world = World::builtin();
    world.roles.insert("CSI".to_owned(), privileges.iter().map(|name| (*name).to_owned()).collect());
    let of_token: Vec<_> = world.acl.iter().filter(|entry| entry.who == CSI).collect();
    assert!(matches!(of_token[..], [entry] if entry.path == "/" && entry.role == "CSI"));
    world
}

#[tokio::test(start_paused = true)]
async fn the_life_of_a_volume_takes_five_privileges_and_never_sys_audit() {
    let bench = Bench::with(with_role(&FIVE), CSI);
    life(&bench).await.expect("the five are enough");
    let log = bench.sim.log();
    assert!(log.iter().all(|entry| entry.status != 403), "nothing was refused on the way");
    // Calls that show nothing, or less, without Sys.Audit are not made.
    let needs_more = ["/cluster/status", "/cluster/ha", "/access/acl", "/version"];
    assert!(log.iter().all(|entry| !needs_more.iter().any(|path| entry.path.contains(path))));

    for lacking in FIVE {
        let rest: Vec<&str> = FIVE.into_iter().filter(|privilege| *privilege != lacking).collect();
        let world = with_role(&rest);
        let secret = world.token(CSI).expect("the token").secret.clone();
        let bench = Bench::with(world, CSI);
        assert!(life(&bench).await.is_err(), "{lacking} is not needed");
        // The preflight says so before the first volume does.
        let token = proxmox_csi::pve::client::Token { id: CSI.to_owned(), secret };
        let region = REGION.parse().expect("a region");
        let client =
            Client::new(region, in_process(&bench.sim), &token, Metrics::default()).expect("a token");
        let missing = client.missing_privileges().await.expect("an answer");
        let needed: BTreeSet<&str> =
            missing.iter().filter(|one| !one.optional).map(|one| one.privilege.as_str()).collect();
        assert_eq!(needed, BTreeSet::from([lacking]));
    }
}
