//! The Identity service, of the controller and of the node.

use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::proto::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse, identity_server, plugin_capability,
};

/// The name of the driver unless another is set.
pub const DRIVER_NAME: &str = "csi.proxmox.sinextra.dev";

/// Whether the process can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Not yet, and nothing is wrong: it starts, or another replica leads.
    NotYet,
    /// It can.
    Ready,
    /// Something it needs is missing; the text says what.
    Unhealthy(String),
}

/// The Identity service.
#[derive(Clone)]
pub struct IdentityService {
    name: String,
    readiness: watch::Receiver<Readiness>,
}

impl IdentityService {
    /// The service of a driver of this name. `readiness` is what Probe answers; it costs nothing to ask, as often as anybody likes.
    pub fn new(name: impl Into<String>, readiness: watch::Receiver<Readiness>) -> Self {
        Self { name: name.into(), readiness }
    }
}

#[tonic::async_trait]
impl identity_server::Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.name.clone(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..GetPluginInfoResponse::default()
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        use plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion};
        let service = |kind: service::Type| Type::Service(Service { r#type: kind.into() });
        let online = VolumeExpansion { r#type: volume_expansion::Type::Online.into() };
        let kinds = [
            service(service::Type::ControllerService),
            service(service::Type::VolumeAccessibilityConstraints),
            Type::VolumeExpansion(online),
        ];
        let capabilities = kinds.map(|kind| PluginCapability { r#type: Some(kind) }).into();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let readiness = self.readiness.borrow().clone();
        match readiness {
            Readiness::Ready => Ok(Response::new(ProbeResponse { ready: Some(true) })),
            Readiness::NotYet => Ok(Response::new(ProbeResponse { ready: Some(false) })),
            Readiness::Unhealthy(why) => Err(Status::failed_precondition(why)),
        }
    }
}
