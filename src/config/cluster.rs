//! One Proxmox cluster of the configuration: where its servers are, how they are trusted, and who the driver is to them.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{ConfigError, yaml};
use crate::types::{
    Credentials, Fingerprint, Region,
    credentials::{Secret, Source},
};

/// A Proxmox cluster.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Its name in topology labels and volume handles.
    pub region: Region,
    /// `https://host:8006`, one or several nodes of the cluster.
    pub urls: Vec<String>,
    /// Which certificates of theirs are believed.
    pub trust: Trust,
    /// Who the driver is to them.
    pub credentials: Credentials,
}

/// Which certificates are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// Those of the authorities that the system trusts.
    System,
    /// Those of the authorities in this PEM file, and no others.
    Ca(PathBuf),
    /// Just these, whoever signed them.
    Fingerprints(Vec<Fingerprint>),
    /// Any.
    Anything,
}

#[derive(Deserialize)]
pub(super) struct RawCluster {
    #[serde(default)]
    url: Option<String>,
    #[serde(default)]
    urls: Vec<String>,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    ca_file: Option<PathBuf>,
    #[serde(default)]
    fingerprint: Option<String>,
    #[serde(default)]
    fingerprints: Vec<String>,
    #[serde(default)]
    token_id: Option<String>,
    #[serde(default)]
    token_id_file: Option<PathBuf>,
    #[serde(default)]
    token_secret: Option<String>,
    #[serde(default)]
    token_secret_file: Option<PathBuf>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    password_file: Option<PathBuf>,
    region: String,
}

/// Reads one entry of `clusters`; files that hold credentials must be readable now.
pub(super) fn read(path: &Path, raw: RawCluster) -> Result<ClusterConfig, ConfigError> {
    let value = |why: String| ConfigError::Value { path: path.to_owned(), why };
    let region: Region = raw.region.parse().map_err(|error| value(format!("`clusters.region`: {error}")))?;
    let of_region = |why: String| value(format!("region `{region}`: {why}"));

    let trust = trust(raw.insecure, raw.ca_file, raw.fingerprint.into_iter().chain(raw.fingerprints));
    let trust = trust.map_err(of_region)?;

    let source = |key: &str, inline: Option<String>, file: Option<PathBuf>| match (
        inline.filter(|text| !text.trim().is_empty()),
        file,
    ) {
        (Some(text), None) => Ok(Some(Source::Inline(Secret::new(text.trim())))),
        (None, Some(file)) => Ok(Some(Source::File(file))),
        (Some(_), Some(_)) => Err(of_region(format!("both `{key}` and `{key}_file` are set"))),
        (None, None) => Ok(None),
    };
    let token_id = source("token_id", raw.token_id, raw.token_id_file)?;
    let token_secret = source("token_secret", raw.token_secret, raw.token_secret_file)?;
    let username = source("username", raw.username, None)?;
    let password = source("password", raw.password, raw.password_file)?;
    let missing = |key: &str| of_region(format!("neither `{key}` nor `{key}_file` is set"));
    let is_login = username.is_some() || password.is_some();
    if is_login && (token_id.is_some() || token_secret.is_some()) {
        return Err(of_region(
            "both a token and a `username` with a `password` are set; hint: keep the token".to_owned(),
        ));
    }
    let credentials = if is_login {
        let username = username.ok_or_else(|| of_region("`username` is not set".to_owned()))?;
        let name = checked(&username, |text| text.contains('@') && !text.contains('!'))?;
        if !name {
            return Err(of_region("`username` has no realm; hint: it has the form user@realm".to_owned()));
        }
        Credentials::Login { username, password: password.ok_or_else(|| missing("password"))? }
    } else {
        let id = token_id.ok_or_else(|| missing("token_id"))?;
        if !checked(&id, |text| text.contains('@') && text.contains('!'))? {
            return Err(of_region(
                "`token_id` is no token id; hint: it has the form user@realm!name".to_owned(),
            ));
        }
        Credentials::Token { id, secret: token_secret.ok_or_else(|| missing("token_secret"))? }
    };
    let (Credentials::Token { secret, .. } | Credentials::Login { password: secret, .. }) = &credentials;
    if !checked(secret, |text| !text.is_empty())? {
        return Err(of_region("the file of the secret is empty".to_owned()));
    }

    let urls: Vec<String> = raw.url.into_iter().chain(raw.urls).collect();
    if urls.is_empty() {
        return Err(of_region("neither `url` nor `urls` is set".to_owned()));
    }
    Ok(ClusterConfig { region, urls, trust, credentials })
}

/// Contradictions are refused: what looks like a safeguard must be one.
fn trust(
    insecure: bool,
    ca_file: Option<PathBuf>,
    fingerprints: impl Iterator<Item = String>,
) -> Result<Trust, String> {
    let fingerprints: Result<Vec<Fingerprint>, _> = fingerprints.map(|text| text.trim().parse()).collect();
    let fingerprints = fingerprints.map_err(|error| format!("`fingerprint`: {error}"))?;
    match (insecure, ca_file, fingerprints.as_slice()) {
        (true, None, []) => Ok(Trust::Anything),
        (false, Some(path), []) => Ok(Trust::Ca(path)),
        (false, None, []) => Ok(Trust::System),
        (false, None, _) => Ok(Trust::Fingerprints(fingerprints)),
        _ => {
            Err("more than one of `insecure`, `ca_file` and `fingerprint` is set; hint: keep one".to_owned())
        }
    }
}

/// Whether the text that a source has now passes a test.
fn checked(source: &Source, test: impl Fn(&str) -> bool) -> Result<bool, ConfigError> {
    match source {
        Source::Inline(secret) => Ok(test(secret.expose())),
        Source::File(path) => Ok(test(yaml::text(path)?.trim())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(keys: &str) -> Result<ClusterConfig, String> {
        let text = format!("{{region: r1, url: 'https://pve1:8006', {keys}}}");
        let path = Path::new("config.yaml");
        let (raw, _) = yaml::parse::<RawCluster>(path, &text).map_err(|error| error.to_string())?;
        read(path, raw).map_err(|error| error.to_string())
    }

    #[test]
    fn a_password_is_taken_where_there_is_no_token() {
        let login = cluster("username: root@pam, password: s3cret").expect("a login").credentials;
        let expected =
            Credentials::Login { username: Source::inline("root@pam"), password: Source::inline("s3cret") };
        assert_eq!(login, expected);
        for (keys, expected) in [
            ("username: root@pam", "neither `password` nor `password_file` is set"),
            ("password: s3cret", "`username` is not set"),
            ("username: root, password: s3cret", "user@realm"),
            ("username: root@pam, password: s3cret, token_id: a@b!c", "keep the token"),
            (
                "username: root@pam, password: s3cret, password_file: /x",
                "both `password` and `password_file`",
            ),
            ("username: root@pam, password_file: /does/not/exist", "/does/not/exist"),
        ] {
            let error = cluster(keys).expect_err(keys);
            assert!(error.contains(expected), "{keys}: {error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
        // What a chart writes for a value that is not set.
        cluster("username: '', password: '', token_id: a@pve!b, token_secret: x").expect("a token");
    }

    #[test]
    fn one_kind_of_trust_is_chosen() {
        let with = |keys: &str| cluster(&format!("token_id: a@pve!b, token_secret: x, {keys}"));
        let print = "AB:".repeat(31) + "AB";
        let parsed: Fingerprint = print.parse().expect("a fingerprint");
        for (keys, expected) in [
            (String::new(), Trust::System),
            ("insecure: true".to_owned(), Trust::Anything),
            ("ca_file: /ca.pem".to_owned(), Trust::Ca("/ca.pem".into())),
            (format!("fingerprint: '{print}'"), Trust::Fingerprints(vec![parsed])),
            (
                format!("fingerprint: '{print}', fingerprints: ['{print}']"),
                Trust::Fingerprints(vec![parsed; 2]),
            ),
        ] {
            assert_eq!(with(&keys).expect("it can be used").trust, expected, "{keys}");
        }
        for keys in ["insecure: true, ca_file: /ca.pem", &format!("ca_file: /x, fingerprint: '{print}'")] {
            assert!(with(keys).expect_err("a contradiction").contains("keep one"));
        }
        assert!(with("fingerprint: 'AB:CD'").expect_err("too short").contains("64 hex digits"));
    }
}
