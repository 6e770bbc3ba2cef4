//! The cluster's own certificate authority, and who it vouches for.

use std::{fs, io, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

/// An authority whose certificates lie as files in one directory.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

fn other(error: rcgen::Error) -> io::Error {
    io::Error::other(error)
}

impl Authority {
    /// Makes one, and its certificate `ca.crt`.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let mut params = CertificateParams::new(Vec::new()).map_err(other)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(DnType::CommonName, "certificate authority of a test cluster");
        let key = KeyPair::generate().map_err(other)?;
        let issuer = CertifiedIssuer::self_signed(params, key).map_err(other)?;
        fs::write(directory.join("ca.crt"), issuer.pem())?;
        Ok(Self(issuer))
    }

    /// Writes `<file>.crt` and `<file>.key`, good for servers on this machine and for clients. To the API server the common name is the
    /// user and the organisation the group.
    pub fn issue(&self, directory: &Path, file: &str, user: &str, group: Option<&str>) -> io::Result<()> {
        let names = ["localhost", "127.0.0.1", "kubernetes.default.svc"].map(str::to_owned);
        let mut params = CertificateParams::new(names).map_err(other)?;
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().map_err(other)?;
        let certificate = params.signed_by(&key, &self.0).map_err(other)?;
        fs::write(directory.join(format!("{file}.crt")), certificate.pem())?;
        fs::write(directory.join(format!("{file}.key")), key.serialize_pem())
    }
}
