//! The client over real TLS: certificates, dead endpoints, wrong tokens, and connections that the server closes.

mod support;

use proxmox_csi::{
    csi::controller::ControllerService,
    pve::{
        Client,
        client::Token,
        transport::{HttpsOptions, https},
    },
    runtime::Operations,
    sim::{
        Options, Sim, World,
        clock::Profile,
        http::{Listening, Tls},
    },
    telemetry::metrics::Metrics,
    types::VmId,
    volume::{Settings, Volumes},
};
use support::{Bench, CSI, REGION, assert_refused, nodes_of};
use tonic::Code;

/// A simulator that listens on loopback, and the certificate of its authority.
async fn listening() -> (Sim, Listening, Vec<u8>) {
    let options = Options { time: Profile::None, ..Options::default() };
    let sim = Sim::start(World::builtin(), options).expect("the world can be made");
    let tls = Tls::generate(&[]).expect("certificates");
    let ca = tls.ca_pem().as_bytes().to_vec();
    let listening = sim.listen("127.0.0.1:0".parse().expect("an address"), &tls).await.expect("a port");
    (sim, listening, ca)
}

fn bench(sim: Sim, options: &HttpsOptions, secret: Option<&str>) -> Bench {
    let world = World::builtin();
    let secret = secret.unwrap_or(&world.token(CSI).expect("the token").secret).to_owned();
    let token = Token { id: CSI.to_owned(), secret };
    let region = REGION.parse().expect("a region");
    let transport = https(options).expect("a transport");
    let client = Client::new(region, transport, &token, Metrics::default()).expect("a legal token");
    let settings = Settings { owner: VmId::new(9999).expect("a VMID"), holders: 999_990_000..=999_999_999 };
    let operations = Operations::default();
    let volumes = Volumes::new(vec![client], nodes_of(&sim), settings);
    Bench { controller: ControllerService::new(volumes, operations.clone()), operations, sim }
}

#[tokio::test]
async fn a_server_of_the_named_authority_is_trusted_and_survives_its_closing_of_connections() {
    let (sim, server, ca) = listening().await;
    let url = server.url();
    let bench = bench(sim, &HttpsOptions { url, ca_pem: Some(ca), insecure: false }, None);
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
    let stranger = Tls::generate(&[]).expect("certificates").ca_pem().as_bytes().to_vec();
    for ca_pem in [Some(stranger), None] {
        let bench = bench(sim.clone(), &HttpsOptions { url: url.clone(), ca_pem, insecure: false }, None);
        let refused = bench.attach("test//shared/9999/vm-9999-x.raw", "worker-101").await;
        assert_refused(refused, Code::Unavailable, &["was not sent", "certificate"]);
    }
    assert!(sim.log().is_empty());
}

#[tokio::test]
async fn insecure_is_only_for_who_asks_for_it() {
    let (sim, server, _) = listening().await;
    let url = server.url();
    let bench = bench(sim, &HttpsOptions { url, ca_pem: None, insecure: true }, None);
    bench.volume("pvc-1", "shared").await;
}

#[tokio::test]
async fn a_dead_endpoint_is_unavailable_and_named() {
    let (sim, _, ca) = listening().await;
    // A port that was free a moment ago, and that nobody listens on.
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let options =
        HttpsOptions { url: format!("https://127.0.0.1:{port}"), ca_pem: Some(ca), insecure: false };
    let bench = bench(sim, &options, None);
    let refused = bench.create(support::new_volume("pvc-1", "shared")).await;
    assert_refused(refused, Code::Unavailable, &["/cluster/resources", "was not sent", "cannot connect"]);
}

#[tokio::test]
async fn a_wrong_secret_is_unauthenticated_and_not_repeated_in_the_error() {
    let (sim, server, ca) = listening().await;
    let url = server.url();
    let options = HttpsOptions { url, ca_pem: Some(ca), insecure: false };
    let bench = bench(sim, &options, Some("wrong-s3cret"));
    let status = bench.create(support::new_volume("pvc-1", "shared")).await.expect_err("refused");
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("Authentication failed!"), "{}", status.message());
    assert!(!status.message().contains("s3cret"), "{}", status.message());
}
