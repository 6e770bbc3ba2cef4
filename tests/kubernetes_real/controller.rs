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
}

/// What kubectl prints of the events about an object, once there is one for this reason.
async fn event(rig: &Rig, namespace: &str, kind: &str, name: &str, reason: &str) -> String {
    let about =
        format!("--field-selector=involvedObject.kind={kind},involvedObject.name={name},reason={reason}");
    let namespace = format!("--namespace={namespace}");
    let shown = ["get", "events", "--no-headers", &namespace, &about];
    until(reason, async || !rig.cluster.kubectl(&shown).await.is_empty()).await;
    rig.cluster.kubectl(&shown).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_must_mend_is_an_event_and_every_right_is_used() {
    let rig = Rig::start("tests/fixtures/rbac-controller.yaml").await;
    let (_one, _two) = (rig.kubelet("w101", 101).await, rig.kubelet("w102", 102).await);
    let mut controller = rig.controller("csi-a").await;
    until("it is ready", async || is_ready(&rig, "csi-a").await == Some(true)).await;
    let volume = create(&rig, "csi-a", "pvc-1").await.expect("it acts").volume_id;

    // On the node whose VM takes no disks.
    assert!(rig.sim.set_vm_key(101, "hotplug", Some("network,usb")));
    attach(&rig, "csi-a", &volume, "w101").await.expect_err("it can't be plugged");
    let shown = event(&rig, "default", "Node", "w101", "HotplugOff").await;
    assert!(shown.contains("Warning") && shown.contains("qm set 101 --hotplug network,disk,usb"), "{shown}");
    assert!(rig.sim.set_vm_key(101, "hotplug", None));

    // On the claim of a volume that another VM has. Binding is played, as no controller manager runs.
    let objects = rig.cluster.directory().join("claims.yaml");
    std::fs::write(&objects, claims(&volume)).expect("a file");
    rig.cluster.kubectl(&["apply", "--filename", &objects.display().to_string()]).await;
    let bound = r#"{"status":{"phase":"Bound"}}"#;
    rig.cluster
        .kubectl(&["patch", "pv", "pv-1", "--subresource=status", "--type=merge", "--patch", bound])
        .await;
    attach(&rig, "csi-a", &volume, "w101").await.expect("it can be plugged now");
    attach(&rig, "csi-a", &volume, "w102").await.expect_err("another vm has it");
    let shown = event(&rig, "kube-public", "PersistentVolumeClaim", "bound", "VolumeHeld").await;
    assert!(shown.contains("VM 101"), "{shown}");

    // What is changed of a volume is kept with its PV, on top of what its class says.
    let change = proto::ControllerModifyVolumeRequest {
        volume_id: volume.clone(),
        mutable_parameters: BTreeMap::from([("backup".to_owned(), "true".to_owned())]),
        ..Default::default()
    };
    client(&rig, "csi-a").await.controller_modify_volume(change).await.expect("changed");
    let kept = rig.cluster.kubectl_json(&["get", "persistentvolume", "pv-1"]).await;
    assert_eq!(
        kept["metadata"]["annotations"]["csi.proxmox.sinextra.dev/attributes"],
        r#"{"backup":"true","diskIOPS":"500"}"#
    );

    // On a claim that waits for its volume.
    let mut new = new_volume("pvc-2", "nowhere");
    new.parameters.insert("csi.storage.k8s.io/pvc/namespace".into(), "kube-public".into());
    new.parameters.insert("csi.storage.k8s.io/pvc/name".into(), "waiting".into());
    client(&rig, "csi-a").await.create_volume(new).await.expect_err("there is no such storage");
    let shown = event(&rig, "kube-public", "PersistentVolumeClaim", "waiting", "NoSuchStorage").await;
    assert!(shown.contains("nowhere"), "{shown}");

    // A node that is no more has let go; the VM that has the volume is a living node's, which only a list of all nodes can tell.
    let late = ControllerUnpublishVolumeRequest {
        volume_id: volume.clone(),
        node_id: "w-of-yesterday".into(),
        ..Default::default()
    };
    client(&rig, "csi-a").await.controller_unpublish_volume(late).await.expect("it is detached from there");
    assert_eq!(
        rig.sim.vm(101).expect("it is there").open_volumes().count(),
        2,
        "a late call pulled the disk"
    );

    // It gives the lease back, which is an update as a renewal is.
    assert!(controller.terminate().await.success());
    rig.assert_nothing_was_refused(CONTROLLER);
    assert_eq!(rights::used(&rig, CONTROLLER), rights::granted(&rig, CONTROLLER).await);
}

/// A volume with its class, the claim that it is bound to, and one that waits.
fn claims(volume: &str) -> String {
    format!(
        "apiVersion: storage.k8s.io/v1
kind: VolumeAttributesClass
metadata: {{name: gold}}
driverName: csi.proxmox.sinextra.dev
parameters: {{diskIOPS: \"500\"}}
---
apiVersion: v1
kind: PersistentVolume
metadata: {{name: pv-1}}
spec:
  volumeAttributesClassName: gold
  capacity: {{storage: 1Gi}}
  accessModes: [ReadWriteOnce]
  storageClassName: proxmox
  claimRef: {{apiVersion: v1, kind: PersistentVolumeClaim, namespace: kube-public, name: bound}}
  csi: {{driver: csi.proxmox.sinextra.dev, volumeHandle: {volume}}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: bound, namespace: kube-public}}
spec: {{storageClassName: proxmox, accessModes: [ReadWriteOnce], volumeName: pv-1, resources: {{requests: {{storage: 1Gi}}}}}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: waiting, namespace: kube-public}}
spec: {{storageClassName: proxmox, accessModes: [ReadWriteOnce], resources: {{requests: {{storage: 1Gi}}}}}}
"
    )
}
