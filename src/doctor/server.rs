//! One server of a region, step by step: name, address, certificate, clock, token.

use std::time::Duration;

use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};

use super::finding::{Code, Finding, Report, Severity};
use crate::{
    k8s,
    pve::{ApiError, Client, audit::TokenRow},
    telemetry::log::chain,
    types::NodeName,
};

/// How long a name or an address may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Seconds by which clocks may differ.
const SKEW: i64 = 30;
/// Seconds before a token's end from which on it is told.
const SOON: i64 = 30 * 24 * 3600;

/// A server.
pub struct Server {
    /// Its URL, as it stands in the configuration.
    pub url: String,
    /// A client over this server alone.
    pub client: Client,
}

/// What a server answered.
#[derive(Debug, Clone)]
pub struct ServerView {
    /// Its URL.
    pub url: String,
    /// What it said of itself, or what went wrong.
    pub answer: Result<Answer, Trouble>,
}

/// What a server said.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The version of Proxmox VE.
    pub version: String,
    /// Seconds by which its clock is ahead of this machine's, where it told.
    pub ahead: Option<i64>,
    /// The nodes of its cluster.
    pub nodes: Vec<NodeName>,
    /// The token as Proxmox knows it, where the token may ask.
    pub token: Option<TokenRow>,
}

/// What went wrong with a server.
#[derive(Debug, Clone)]
pub struct Trouble {
    /// What kind.
    pub code: Code,
    /// What it said.
    pub text: String,
}

/// Tries a server.
pub(super) async fn look(server: &Server, who: &str) -> ServerView {
    ServerView { url: server.url.clone(), answer: ask(server, who).await }
}

async fn ask(server: &Server, who: &str) -> Result<Answer, Trouble> {
    reach(&server.url).await.map_err(|text| Trouble { code: Code::ServerUnreachable, text })?;
    let version = server.client.version().await.map_err(|error| trouble(&error))?;
    let date = server.client.server_date();
    let ahead = date.and_then(|then| Some(i64::try_from(then).ok()? - k8s::now_seconds()));
    let resources = server.client.resources().await.map_err(|error| trouble(&error))?;
    let mut nodes: Vec<NodeName> = resources.nodes.into_iter().map(|row| row.node).collect();
    nodes.sort();
    let (user, name) = who.split_once('!').unwrap_or((who, ""));
    let tokens = server.client.tokens(user).await.unwrap_or_default();
    Ok(Answer { version, ahead, nodes, token: tokens.into_iter().find(|token| token.name == name) })
}

/// Whether something listens at the address.
async fn reach(url: &str) -> Result<(), String> {
    let uri: http::Uri = url.parse().map_err(|_| format!("`{url}` is not a URL"))?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(443);
    let addresses = match timeout(PATIENCE, lookup_host((host.as_str(), port))).await {
        Ok(Ok(addresses)) => addresses.collect::<Vec<_>>(),
        Ok(Err(error)) => return Err(format!("the name `{host}` can not be resolved: {error}")),
        Err(_) => return Err(format!("the name `{host}` was not resolved within {} s", PATIENCE.as_secs())),
    };
    let mut last = format!("the name `{host}` has no address");
    for address in addresses {
        match timeout(PATIENCE, TcpStream::connect(address)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => last = format!("nothing answers at {address}: {error}"),
            Err(_) => last = format!("nothing answers at {address} within {} s", PATIENCE.as_secs()),
        }
    }
    Err(last)
}

fn trouble(error: &ApiError) -> Trouble {
    let text = chain(error);
    let code = match error {
        _ if error.is_unauthenticated() => Code::TokenRefused,
        ApiError::NotSent { .. } if is_certificate(&text) => Code::Certificate,
        _ => Code::ServerFailed,
    };
    Trouble { code, text }
}

/// The words of rustls (`rustls::Error`, `CertificateError`).
fn is_certificate(text: &str) -> bool {
    text.contains("certificate") || text.contains("UnknownIssuer")
}

/// What can be done about a certificate.
fn certificate_hint(text: &str) -> (&'static str, Option<&'static str>) {
    if text.contains("not valid for name") || text.contains("NotValidForName") {
        return (
            "the certificate is for other names: write one of them into `url`, or give the server a certificate with this name",
            Some(
                "pvecm updatecerts --force && systemctl restart pveproxy   # on that server, after its name or address changed",
            ),
        );
    }
    if text.contains("expired") || text.contains("Expired") {
        return (
            "the certificate has expired, or the clock of this machine is wrong",
            Some("pvecm updatecerts --force && systemctl restart pveproxy   # on that server"),
        );
    }
    if text.contains("not valid yet") || text.contains("NotValidYet") {
        return (
            "the certificate is not valid yet: the clock of this machine or of the server is wrong",
            None,
        );
    }
    if ["UnknownIssuer", "unknown issuer", "BadSignature"].iter().any(|word| text.contains(word)) {
        return (
            "the certificate is of an authority that is not trusted: give the cluster's own in `ca_file`, or the certificate's `fingerprint`",
            Some("cat /etc/pve/pve-root-ca.pem   # on any node of the cluster"),
        );
    }
    if text.contains("fingerprint") {
        return (
            "the server has another certificate than the configured one: if somebody renewed it, write its `fingerprint` into the configuration; if nobody did, do not",
            Some(
                "openssl x509 -in /etc/pve/local/pveproxy-ssl.pem -noout -fingerprint -sha256   # on that server; pve-ssl.pem where there is no such file",
            ),
        );
    }
    ("look at the certificate that the server shows", None)
}

/// What was found about the servers of a region; tells whether one gave an answer.
pub(super) fn check(area: &str, who: &str, servers: &[ServerView], report: &mut Report) -> bool {
    let any = servers.iter().any(|server| server.answer.is_ok());
    let mut refused = false;
    for ServerView { url, answer } in servers {
        match answer {
            Ok(answer) => passed(area, url, answer, report),
            Err(trouble) if trouble.code == Code::TokenRefused => {
                // The token is one for all servers of a region: it is told once.
                if !std::mem::replace(&mut refused, true) {
                    report.find(token_refused(area, who, &trouble.text));
                }
            }
            Err(trouble) => {
                let mut finding = Finding::new(trouble.code, area, url, &trouble.text);
                if trouble.code == Code::Certificate {
                    let (hint, command) = certificate_hint(&trouble.text);
                    finding = finding.hint(hint);
                    if let Some(command) = command {
                        finding = finding.command(command);
                    }
                }
                if any {
                    finding = finding.severity(Severity::Warning);
                }
                report.find(finding);
            }
        }
    }
    let mut answers = servers.iter().filter_map(|server| Some((&server.url, server.answer.as_ref().ok()?)));
    if let Some((first, answer)) = answers.next() {
        for (url, other) in answers.filter(|(_, other)| other.nodes != answer.nodes) {
            let nodes =
                |answer: &Answer| answer.nodes.iter().map(NodeName::as_str).collect::<Vec<_>>().join(", ");
            let text = format!(
                "`{url}` is of a cluster with nodes {}, `{first}` of one with nodes {}",
                nodes(other),
                nodes(answer)
            );
            let hint = "each cluster is a region of its own: volumes would be looked for in the wrong one";
            report.find(Finding::new(Code::ServersDiffer, area, url, text).hint(hint));
        }
        token_end(area, who, answer.token.as_ref(), report);
    }
    any
}

fn passed(area: &str, url: &str, answer: &Answer, report: &mut Report) {
    let clock = match answer.ahead {
        Some(ahead) if ahead.abs() > SKEW => {
            let (by, way) = (ahead.abs(), if ahead > 0 { "ahead of" } else { "behind" });
            let text = format!("the clock of `{url}` is {by} s {way} the clock of this machine");
            let hint = "certificates and tokens end by the clock: see to NTP (chrony) on both sides";
            report.find(Finding::new(Code::ClockSkew, area, url, text).hint(hint));
            String::new()
        }
        Some(_) => format!(", clocks agree within {SKEW} s"),
        None => String::new(),
    };
    report.pass(area, format!("{url} answers, trusted: Proxmox VE {}{clock}", answer.version));
}

fn token_refused(area: &str, who: &str, text: &str) -> Finding {
    let finding = Finding::new(Code::TokenRefused, area, who, text);
    let Some((user, name)) = who.split_once('!') else {
        return finding
            .hint("the user is unknown or switched off, the password is another, or the realm wants a second factor: make an API token");
    };
    finding
        .hint("the token is unknown, expired, switched off with its user, or its secret is another: Proxmox does not say which")
        .command(format!("pveum user token list {user}"))
        .command(format!("pveum user token modify {user} {name} --expire 0"))
        .command(format!(
            "pveum user token remove {user} {name} && pveum user token add {user} {name} --privsep 0   # prints a new secret, once"
        ))
}

fn token_end(area: &str, who: &str, token: Option<&TokenRow>, report: &mut Report) {
    let Some((user, name)) = who.split_once('!') else {
        report.pass(area, format!("the login of {who} is taken"));
        return;
    };
    let Some(token) = token else {
        report.pass(area, format!("the token {who} is taken"));
        report.unseen(
            area,
            format!("when the token expires, and whether its privileges are separated: a token may not ask; `pveum user token list {user}` tells"),
        );
        return;
    };
    let separated = if token.privilege_separation {
        "its privileges are separated from its user's"
    } else {
        "it has the privileges of its user"
    };
    let left = token.expires.and_then(|at| Some((at, i64::try_from(at).ok()? - k8s::now_seconds())));
    match left {
        Some((at, left)) if left < SOON => {
            let text = format!("the token {who} expires at {}", k8s::moment(at));
            report.find(
                Finding::new(Code::TokenExpires, area, who, text)
                    .command(format!("pveum user token modify {user} {name} --expire 0")),
            );
        }
        Some((at, _)) => {
            report.pass(
                area,
                format!("the token {who} is taken; it expires at {}; {separated}", k8s::moment(at)),
            );
        }
        None => report.pass(area, format!("the token {who} is taken; it never expires; {separated}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_trouble_with_a_certificate_has_its_own_remedy() {
        for (text, expected) in [
            ("invalid peer certificate: UnknownIssuer", "ca_file"),
            (
                "invalid peer certificate: certificate not valid for name \"x\"; certificate is only valid for y",
                "`url`",
            ),
            ("invalid peer certificate: certificate expired: verification time 1", "expired"),
            ("invalid peer certificate: certificate not valid yet", "clock"),
            ("invalid peer certificate: BadSignature", "ca_file"),
            ("invalid peer certificate: BadEncoding", "look at"),
        ] {
            assert!(is_certificate(text), "{text}");
            assert!(certificate_hint(text).0.contains(expected), "{text}");
        }
    }

    fn answer(ahead: i64, expires: Option<i64>) -> ServerView {
        let token = TokenRow {
            name: "csi".to_owned(),
            expires: expires.and_then(|left| u64::try_from(k8s::now_seconds() + left).ok()),
            privilege_separation: true,
        };
        let answer =
            Answer { version: "9.2".to_owned(), ahead: Some(ahead), nodes: Vec::new(), token: Some(token) };
        ServerView { url: "https://pve1:8006".to_owned(), answer: Ok(answer) }
    }

    #[test]
    fn a_clock_that_is_off_and_a_token_that_ends_are_told() {
        let codes = |server: ServerView| {
            let mut report = Report::default();
            assert!(check("region r", "csi@pve!csi", &[server], &mut report));
            let codes = report.findings.iter().map(|finding| finding.code.as_str());
            (codes.collect::<Vec<_>>(), report.passed.len())
        };
        assert_eq!(codes(answer(29, None)), (vec![], 2));
        assert_eq!(codes(answer(-31, None)).0, ["clock-skew"]);
        assert_eq!(codes(answer(0, Some(29 * 24 * 3600))).0, ["token-expires"]);
        assert_eq!(codes(answer(0, Some(31 * 24 * 3600))), (vec![], 2));
    }

    #[tokio::test]
    async fn a_name_that_is_none_is_told_from_a_port_where_nothing_listens() {
        let error = reach("https://no-such-host.invalid:8006").await.expect_err("no such name");
        assert!(error.contains("no-such-host.invalid") && error.contains("name"), "{error}");
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
        let error = reach(&format!("https://{free}")).await.expect_err("nothing listens");
        assert!(error.contains("nothing answers at"), "{error}");
        assert!(reach("not a url").await.is_err());
    }
}
