//! The client over real TLS: certificates, dead endpoints, wrong tokens, and connections that the server closes.

mod support;

use proxmox_csi::{
    pve::{
        Client,
        client::Token,
        failover::{Server, region},
        transport::{HttpsOptions, Transport, Trust, https},
    },
    sim::{
        Options, Sim, World,
        clock::Profile,
        http::{Listening, Tls},
    },
    telemetry::metrics::Metrics,
    volume::Volumes,
};
use support::{Bench, CSI, REGION, assert_refused, nodes_of, settings};
use tonic::Code;

/// A simulator that listens on loopback, and the certificate of its authority.
async fn listening() -> (Sim, Listening, Vec<u8>) {
    let (sim, listening, tls) = listening_with_tls().await;
    (sim, listening, tls.ca_pem().as_bytes().to_vec())
}

async fn listening_with_tls() -> (Sim, Listening, Tls) {
    let options = Options { time: Profile::None, ..Options::default() };
    let sim = Sim::start(World::builtin(), options).expect("the world can be made");
    let tls = Tls::generate(&[]).expect("certificates");
    let listening = sim.listen("127.0.0.1:0".parse().expect("an address"), &tls).await.expect("a port");
    (sim, listening, tls)
}

fn bench(sim: Sim, options: &HttpsOptions, secret: Option<&str>) -> Bench {
    over(sim, https(options).expect("a transport"), secret)
}

fn over(sim: Sim, transport: Transport, secret: Option<&str>) -> Bench {
    let world = World::builtin();
    let secret = secret.unwrap_or(&world.token(CSI).expect("the token").secret).to_owned();
    let token = Token { id: CSI.to_owned(), secret };
    let region = REGION.parse().expect("a region");
    let client = Client::new(region, transport, &token, Metrics::default()).expect("a legal token");
    let volumes = Volumes::new(vec![client], nodes_of(&sim), settings());
    Bench::of(sim, volumes)
}

#[tokio::test]
async fn a_server_of_the_named_authority_is_trusted_and_survives_its_closing_of_connections() {
    let (sim, server, ca) = listening().await;
    let url = server.url();
    let bench = bench(sim, &HttpsOptions { url, trust: Trust::Ca(ca) }, None);
    // More than 100 requests, refused ones among them: the server closes connections all the time.
    for round in 0..8 {
        let volume = bench.volume(&format!("pvc-{round}"), "shared").await;
        bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
        bench.detach(&volume.volume_id, "worker-101").await.expect("detached");
        bench.delete(&volume.volume_id).await.expect("deleted");
    }
    assert!(bench.sim.log().len() > 100);
}

#[tokio::test]
async fn a_server_of_another_authority_is_not_trusted_and_never_sees_the_token() {
    let (sim, server, _) = listening().await;
    let url = server.url();
    let other = Tls::generate(&[]).expect("certificates");
    let (stranger, another) = (other.ca_pem().as_bytes().to_vec(), other.fingerprint());
    for trust in [Trust::Ca(stranger), Trust::System, Trust::Fingerprints(vec![another])] {
        let bench = bench(sim.clone(), &HttpsOptions { url: url.clone(), trust }, None);
        let refused = bench.attach("test//shared/9999/vm-9999-x.raw", "worker-101").await;
        assert_refused(refused, Code::Unavailable, &["was not sent", "certificate"]);
    }
    assert!(sim.log().is_empty());
}

#[tokio::test]
async fn insecure_is_only_for_who_asks_for_it() {
    let (sim, server, _) = listening().await;
    let url = server.url();
    let bench = bench(sim, &HttpsOptions { url, trust: Trust::Anything }, None);
    bench.volume("pvc-1", "shared").await;
}

#[tokio::test]
async fn a_dead_endpoint_is_unavailable_and_named() {
    let (sim, _, ca) = listening().await;
    // A port that was free a moment ago, and that nobody listens on.
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let options = HttpsOptions { url: format!("https://127.0.0.1:{port}"), trust: Trust::Ca(ca) };
    let bench = bench(sim, &options, None);
    let refused = bench.create(support::new_volume("pvc-1", "shared")).await;
    assert_refused(refused, Code::Unavailable, &["/cluster/resources", "was not sent", "cannot connect"]);
}

#[tokio::test]
async fn a_wrong_secret_is_unauthenticated_and_not_repeated_in_the_error() {
    let (sim, server, ca) = listening().await;
    let url = server.url();
    let options = HttpsOptions { url, trust: Trust::Ca(ca) };
    let bench = bench(sim, &options, Some("wrong-s3cret"));
    let status = bench.create(support::new_volume("pvc-1", "shared")).await.expect_err("refused");
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("Authentication failed!"), "{}", status.message());
    assert!(!status.message().contains("s3cret"), "{}", status.message());
}

#[tokio::test]
async fn a_server_whose_certificate_has_the_configured_fingerprint_is_trusted_under_any_name() {
    let (sim, server, tls) = listening_with_tls().await;
    // The certificate names loopback addresses and `localhost` only; what counts is the certificate itself.
    let url = format!("https://127.0.0.2:{}", server.address().port());
    drop(server);
    let server = sim.listen("127.0.0.2:0".parse().expect("an address"), &tls).await.expect("a port");
    let url = url.replace(url.rsplit(':').next().expect("a port"), &server.address().port().to_string());
    let stranger = Tls::generate(&[]).expect("certificates").fingerprint();
    let trust = Trust::Fingerprints(vec![stranger, tls.fingerprint()]);
    let trusting = bench(sim.clone(), &HttpsOptions { url: url.clone(), trust }, None);
    trusting.volume("pvc-1", "shared").await;

    let asked = sim.log().len();
    let trust = Trust::Fingerprints(vec![stranger]);
    let wary = bench(sim.clone(), &HttpsOptions { url, trust }, None);
    let refused = wary.create(support::new_volume("pvc-2", "shared")).await;
    let found = tls.fingerprint().to_string();
    assert_refused(refused, Code::Unavailable, &["was not sent", &found, "not a configured one"]);
    assert_eq!(sim.log().len(), asked, "nothing was sent");
}

#[tokio::test]
async fn a_dead_server_among_several_is_passed_over() {
    let (sim, server, ca) = listening().await;
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let urls = [format!("https://127.0.0.1:{port}"), server.url()];
    let servers = urls.map(|url| {
        let options = HttpsOptions { url: url.clone(), trust: Trust::Ca(ca.clone()) };
        Server { name: url, transport: https(&options).expect("a transport") }
    });
    let metrics = Metrics::default();
    let name = REGION.parse().expect("a region");
    let transport = region(&name, servers.into(), metrics.pve()).expect("two servers");
    let bench = over(sim, transport, None);
    let volume = bench.volume("pvc-1", "shared").await;
    bench.attach(&volume.volume_id, "worker-101").await.expect("attached");
    let text = metrics.render();
    assert!(text.contains("proxmox_api_failovers_total{region=\"test\"} 1"), "{text}");
}
