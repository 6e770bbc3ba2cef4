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

#[cfg(test)]
mod tests {
    use identity_server::Identity as _;
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn the_plugin_says_who_it_is_and_what_it_can_and_no_more() {
        let (_, told) = watch::channel(Readiness::Ready);
        let service = IdentityService::new(DRIVER_NAME, told);
        let info = service.get_plugin_info(Request::new(GetPluginInfoRequest {})).await.expect("an answer");
        assert!(info.get_ref().name.len() <= 63 && !info.get_ref().vendor_version.is_empty());
        let request = Request::new(GetPluginCapabilitiesRequest {});
        let answer = service.get_plugin_capabilities(request).await.expect("an answer").into_inner();
        let shown: Vec<String> = answer.capabilities.iter().map(|one| format!("{:?}", one.r#type)).collect();
        assert_eq!(shown.len(), 3, "{shown:?}");
        for (shown, expected) in
            shown.iter().zip(["ControllerService", "VolumeAccessibilityConstraints", "Online"])
        {
            assert!(shown.contains(expected), "{shown}");
        }
    }

    #[tokio::test]
    async fn a_probe_tells_not_yet_from_ready_from_unhealthy() {
        let (tell, told) = watch::channel(Readiness::NotYet);
        let service = IdentityService::new(DRIVER_NAME, told);
        let probe = async || service.probe(Request::new(ProbeRequest {})).await;
        assert_eq!(probe().await.expect("an answer").into_inner().ready, Some(false));
        tell.send_replace(Readiness::Ready);
        assert_eq!(probe().await.expect("an answer").into_inner().ready, Some(true));
        tell.send_replace(Readiness::Unhealthy("mkfs.xfs is missing".to_owned()));
        let status = probe().await.expect_err("it can't serve");
        assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "mkfs.xfs is missing"));
    }
}
