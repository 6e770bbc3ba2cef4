//! The simulator's listener: TLS, status lines, and how long a connection lives.

use proxmox_csi::sim::faults::Fault;
use proxmox_csi::sim::http::{Listening, Tls};
use proxmox_csi::sim::{Sim, World};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

struct Bench {
    sim: Sim,
    tls: Tls,
    listening: Listening,
}

impl Bench {
    async fn start() -> Self {
        let sim = Sim::in_memory(World::builtin()).expect("the built-in world starts");
        let tls = Tls::generate(&[]).expect("certificates");
        let listening =
            sim.listen("127.0.0.1:0".parse().expect("an address"), &tls).await.expect("a free port");
        Self { sim, tls, listening }
    }

    async fn connect(&self) -> Connection {
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(self.tls.ca_pem().as_bytes()).expect("PEM"))
            .expect("the authority is a certificate");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("TLS versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(self.listening.address()).await.expect("it listens");
        let name = ServerName::try_from("127.0.0.1").expect("a name");
        let stream =
            TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("the certificate holds");
        Connection(stream)
    }
}

struct Connection(TlsStream<TcpStream>);

impl Connection {
    /// The head of the answer to a GET, `None` when the connection is closed.
    async fn get(&mut self, path: &str) -> Option<String> {
        let request = format!(
            "GET /api2/json{path} HTTP/1.1\r\nhost: localhost\r\nauthorization: PVEAPIToken=csi@pve!csi=\
             22222222-2222-4222-8222-222222222222\r\n\r\n"
        );
        self.0.write_all(request.as_bytes()).await.ok()?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.0.read_u8().await.ok()?);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).await.ok()?;
        Some(head)
    }

    async fn closed(&mut self) -> bool {
        self.0.read_u8().await.is_err()
    }
}

#[tokio::test]
async fn the_status_line_carries_the_error_and_the_connection_ends() {
    let bench = Bench::start().await;
    let mut connection = bench.connect().await;
    let head = connection.get("/nodes/pve1/qemu/555/config").await.expect("an answer");
    let line = "HTTP/1.1 500 Configuration file 'nodes/pve1/qemu-server/555.conf' does not exist\r\n";
    assert!(head.starts_with(line), "{head}");
    assert!(connection.closed().await);
}

#[tokio::test]
async fn a_connection_serves_a_hundred_requests() {
    let bench = Bench::start().await;
    let mut connection = bench.connect().await;
    for number in 1..=100 {
        let head =
            connection.get("/version").await.unwrap_or_else(|| panic!("closed before request {number}"));
        assert_eq!(head.contains("connection: close"), number == 100, "request {number}");
    }
    assert!(connection.closed().await);
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_five_seconds() {
    let bench = Bench::start().await;
    let mut connection = bench.connect().await;
    assert!(connection.get("/version").await.is_some());
    let begun = tokio::time::Instant::now();
    assert!(tokio::time::timeout(Duration::from_secs(8), connection.closed()).await.expect("it is closed"));
    assert!(begun.elapsed() > Duration::from_millis(4500), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_lost_answer_is_a_connection_that_ends() {
    let bench = Bench::start().await;
    let fault =
        serde_json::from_str::<Fault>(r#"{"fault":"lose_answer","path":"/version"}"#).expect("well formed");
    bench.sim.inject(fault).expect("it waits for a request");
    assert_eq!(bench.connect().await.get("/version").await, None);
    assert!(bench.connect().await.get("/version").await.is_some());
}
