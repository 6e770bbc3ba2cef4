//! The Lease of the CSI controller: one of two acts, and the other says so to its pod's sidecars.

use std::{collections::BTreeMap, time::Duration};

use proxmox_csi::csi::proto::{
    self, ControllerUnpublishVolumeRequest, ProbeRequest, controller_client::ControllerClient,
    identity_client::IdentityClient,
};
use tonic::{Code, Status, transport::Endpoint};

use crate::{
    rig::{CONTROLLER, Rig, until, until_within},
    rights,
    support::{new_volume, publish},
};

/// Whether a controller says that it is ready; `None` where nobody answers.
async fn is_ready(rig: &Rig, name: &str) -> Option<bool> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", rig.socket(name))).expect("a legal address");
    let mut client = IdentityClient::new(endpoint.connect().await.ok()?);
    client.probe(ProbeRequest {}).await.ok()?.into_inner().ready
}

async fn client(rig: &Rig, name: &str) -> ControllerClient<tonic::transport::Channel> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", rig.socket(name))).expect("a legal address");
    ControllerClient::new(endpoint.connect().await.expect("it listens"))
}

async fn create(rig: &Rig, controller: &str, volume: &str) -> Result<proto::Volume, Status> {
    let created = client(rig, controller).await.create_volume(new_volume(volume, "shared")).await?;
    Ok(created.into_inner().volume.expect("an OK has a volume"))
}

async fn attach(
    rig: &Rig,
    controller: &str,
    volume: &str,
    node: &str,
) -> Result<BTreeMap<String, String>, Status> {
    let attached = client(rig, controller).await.controller_publish_volume(publish(volume, node)).await?;
    Ok(attached.into_inner().publish_context)
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_of_two_controllers_one_acts_and_the_other_is_not_ready() {
    let rig = Rig::start("tests/fixtures/rbac-controller.yaml").await;
    let _kubelet = rig.kubelet("w101", 101).await;
    let mut first = rig.controller("csi-a").await;
    until("the first is ready", async || is_ready(&rig, "csi-a").await == Some(true)).await;
    let mut second = rig.controller("csi-b").await;
    until("the second answers", async || is_ready(&rig, "csi-b").await.is_some()).await;
    assert_eq!(is_ready(&rig, "csi-b").await, Some(false));

    let volume = create(&rig, "csi-a", "pvc-1").await.expect("it acts").volume_id;
    attach(&rig, "csi-a", &volume, "w101").await.expect("the Node says which VM it is");
    let asked = rig.sim.log().len();
    for refused in [
        create(&rig, "csi-b", "pvc-2").await.map(drop),
        attach(&rig, "csi-b", &volume, "w101").await.map(drop),
    ] {
        assert_eq!(refused.expect_err("it must not act").code(), Code::Unavailable);
    }
    assert_eq!(rig.sim.log().len(), asked, "who may not act asked Proxmox something");

    // Given back: the next one acts at once.
    assert!(first.terminate().await.success());
    let waited = until("the second is ready", async || is_ready(&rig, "csi-b").await == Some(true)).await;
    assert!(waited < Duration::from_secs(14), "a lease that was given back was waited for: {waited:?}");
    assert_eq!(create(&rig, "csi-b", "pvc-1").await.expect("it acts").volume_id, volume);

    // A node that is no more has let go; the VM that has the volume is a living node's, which only a list of all nodes can tell.
    let late = ControllerUnpublishVolumeRequest {
        volume_id: volume.clone(),
        node_id: "w-of-yesterday".into(),
        ..Default::default()
    };
    client(&rig, "csi-b").await.controller_unpublish_volume(late).await.expect("it is detached from there");
    assert_eq!(
        rig.sim.vm(101).expect("it is there").open_volumes().count(),
        2,
        "a late call pulled the disk"
    );

    // Killed: its lease runs out, and after that the longest lock of Proxmox that it may have taken.
    second.kill();
    let _third = rig.controller("csi-c").await;
    let is_held = async || rig.holder(CONTROLLER).await.is_some_and(|holder| holder.starts_with("csi-c_"));
    until("the third holds the lease", is_held).await;
    assert_eq!(is_ready(&rig, "csi-c").await, Some(false));
    let before = create(&rig, "csi-c", "pvc-3").await.expect_err("it must not act yet");
    assert_eq!(before.code(), Code::Unavailable);
    let acts = async || is_ready(&rig, "csi-c").await == Some(true);
    let waited = until_within(Duration::from_mins(2), "the third is ready", acts).await;
    assert!(waited >= Duration::from_mins(1), "it acts while the one before may be at work: {waited:?}");
    assert_eq!(create(&rig, "csi-c", "pvc-1").await.expect("it acts").volume_id, volume);
    rig.assert_nothing_was_refused(CONTROLLER);
    assert_eq!(rights::used(&rig, CONTROLLER), rights::granted(&rig, CONTROLLER).await);
}
