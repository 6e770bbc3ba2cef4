//! Who may use a volume at once: access modes through the controller's RPCs, over the simulator in process.

mod support;

use proxmox_csi::csi::proto::{
    self, controller_server::Controller as _, volume_capability::access_mode::Mode,
};
use support::{Bench, GIB, assert_refused, mount, new_volume, with_mode};
use tonic::{Code, Request};

/// The drive of a volume in a VM, as its config has it.
fn drive(bench: &Bench, vmid: u32, volume_id: &str) -> String {
    let slots = bench.slots(vmid, volume_id);
    assert_eq!((slots.current.len(), slots.pending.len(), slots.qemu), (1, 0, 1), "{slots:?}");
    bench.sim.vm(vmid).expect("a vm").current(&slots.current[0]).expect("a drive").to_owned()
}

fn is_read_only(drive: &str) -> bool {
    drive.split(',').any(|option| option == "ro=1")
}

#[tokio::test(start_paused = true)]
async fn one_node_may_write_in_every_mode_of_one_node() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await.volume_id;
    for mode in [Mode::SingleNodeWriter, Mode::SingleNodeSingleWriter, Mode::SingleNodeMultiWriter] {
        bench.attach_as(&volume, "worker-101", mode, false).await.expect("attached");
        assert!(!is_read_only(&drive(&bench, 101, &volume)), "{mode:?}");
        bench.detach(&volume, "worker-101").await.expect("detached");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_to_be_read_only_is_a_drive_that_qemu_does_not_write_to() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "local").await.volume_id;
    for (mode, readonly) in [(Mode::SingleNodeReaderOnly, false), (Mode::SingleNodeWriter, true)] {
        let first = bench.attach_as(&volume, "worker-101", mode, readonly).await.expect("attached");
        assert!(is_read_only(&drive(&bench, 101, &volume)), "{mode:?}");
        let again = bench.attach_as(&volume, "worker-101", mode, readonly).await;
        assert_eq!(again.expect("attached"), first);
        bench.detach(&volume, "worker-101").await.expect("detached");
    }
}

#[tokio::test(start_paused = true)]
async fn an_attachment_of_the_other_kind_already_exists() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.attach_as(&volume, "worker-101", Mode::SingleNodeWriter, false).await.expect("attached");
    let before = bench.sim.vm(101).expect("a vm").conf;
    for (mode, readonly) in [(Mode::SingleNodeWriter, true), (Mode::MultiNodeReaderOnly, false)] {
        let refused = bench.attach_as(&volume, "worker-101", mode, readonly).await;
        assert_refused(refused, Code::AlreadyExists, &["VM 101", "scsi1", "writable"]);
    }
    assert_eq!(bench.sim.vm(101).expect("a vm").conf, before);
    bench.detach(&volume, "worker-101").await.expect("detached");
    bench.attach_as(&volume, "worker-101", Mode::MultiNodeReaderOnly, true).await.expect("attached");
    let refused = bench.attach_as(&volume, "worker-101", Mode::SingleNodeWriter, false).await;
    assert_refused(refused, Code::AlreadyExists, &["VM 101", "scsi1", "read-only"]);
}

#[tokio::test(start_paused = true)]
async fn p1_several_vms_get_a_volume_only_while_all_of_them_only_read() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    for node in ["worker-101", "worker-103"] {
        bench.attach_as(&volume, node, Mode::MultiNodeReaderOnly, false).await.expect("attached");
    }
    assert!(is_read_only(&drive(&bench, 101, &volume)) && is_read_only(&drive(&bench, 103, &volume)));
    // Nobody who wants it alone gets it meanwhile, to read or to write.
    for (mode, readonly) in [(Mode::SingleNodeWriter, false), (Mode::SingleNodeWriter, true)] {
        let refused = bench.attach_as(&volume, "worker-102", mode, readonly).await;
        assert_refused(refused, Code::FailedPrecondition, &["worker-102"]);
    }
    assert_refused(bench.delete(&volume).await, Code::FailedPrecondition, &["VM 101"]);
    bench.detach(&volume, "worker-101").await.expect("detached");
    drive(&bench, 103, &volume);
    bench.detach(&volume, "worker-103").await.expect("detached");
    // And of one who writes nobody reads.
    bench.attach_as(&volume, "worker-102", Mode::SingleNodeWriter, false).await.expect("attached");
    let refused = bench.attach_as(&volume, "worker-103", Mode::MultiNodeReaderOnly, true).await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 102", "scsi1"]);
}

#[tokio::test(start_paused = true)]
async fn p1_a_drive_that_is_to_become_writable_at_the_next_start_counts_as_one_that_writes() {
    let bench = Bench::new();
    let volume = bench.volume("pvc-1", "shared").await.volume_id;
    bench.attach_as(&volume, "worker-101", Mode::MultiNodeReaderOnly, true).await.expect("attached");
    let writable = drive(&bench, 101, &volume).replace(",ro=1", "");
    bench.admin("PUT", "/nodes/pve1/qemu/101/config", &format!("scsi1={writable}")).await;
    let refused = bench.attach_as(&volume, "worker-103", Mode::MultiNodeReaderOnly, true).await;
    assert_refused(refused, Code::FailedPrecondition, &["VM 101", "scsi1"]);
}

#[tokio::test(start_paused = true)]
async fn a_local_storage_gives_no_volume_to_several_nodes() {
    let bench = Bench::new();
    let mut request = new_volume("pvc-1", "local");
    request.volume_capabilities.push(with_mode(mount(), Mode::MultiNodeReaderOnly));
    assert_refused(bench.create(request).await, Code::InvalidArgument, &["local", "shared storage"]);
    let volume = bench.volume("pvc-1", "local").await.volume_id;
    let refused = bench.attach_as(&volume, "worker-101", Mode::MultiNodeReaderOnly, true).await;
    assert_refused(refused, Code::InvalidArgument, &["`local`", "`pve1`", "shared storage"]);

    let mut shared = new_volume("pvc-2", "shared");
    shared.volume_capabilities.push(with_mode(mount(), Mode::MultiNodeReaderOnly));
    let shared = bench.create(shared).await.expect("a volume").volume_id;
    for (volume, holds) in [(&volume, false), (&shared, true)] {
        let request = proto::ValidateVolumeCapabilitiesRequest {
            volume_id: volume.clone(),
            volume_capabilities: vec![mount(), with_mode(mount(), Mode::MultiNodeReaderOnly)],
            ..Default::default()
        };
        let answer = bench.controller.validate_volume_capabilities(Request::new(request)).await;
        let answer = answer.expect("an answer").into_inner();
        assert_eq!(answer.confirmed.is_some(), holds, "{volume}: {}", answer.message);
        assert_eq!(answer.message.contains("several nodes"), !holds, "{}", answer.message);
    }
}

#[tokio::test(start_paused = true)]
async fn capacity_counts_only_what_could_serve_the_access_mode() {
    let bench = Bench::new();
    let ask = async |storage: &str, mode| {
        let request = proto::GetCapacityRequest {
            volume_capabilities: vec![with_mode(mount(), mode)],
            parameters: [("storage".to_owned(), storage.to_owned())].into(),
            accessible_topology: None,
        };
        let answer = bench.controller.get_capacity(Request::new(request)).await.expect("an answer");
        answer.into_inner().available_capacity
    };
    assert!(ask("local", Mode::SingleNodeWriter).await > GIB);
    assert_eq!(ask("local", Mode::MultiNodeReaderOnly).await, 0);
    assert!(ask("shared", Mode::MultiNodeReaderOnly).await > GIB);
    assert_eq!(ask("shared", Mode::MultiNodeMultiWriter).await, 0);
}

#[tokio::test(start_paused = true)]
async fn the_capabilities_that_go_with_it_are_advertised() {
    use proto::controller_service_capability::{Type, rpc};
    let bench = Bench::new();
    let answer = bench
        .controller
        .controller_get_capabilities(Request::new(proto::ControllerGetCapabilitiesRequest {}))
        .await
        .expect("an answer");
    let told: Vec<_> = answer
        .into_inner()
        .capabilities
        .into_iter()
        .filter_map(|capability| match capability.r#type? {
            Type::Rpc(rpc) => Some(rpc.r#type()),
        })
        .collect();
    for kind in [rpc::Type::PublishReadonly, rpc::Type::SingleNodeMultiWriter] {
        assert!(told.contains(&kind), "{kind:?} is not in {told:?}");
    }
    // These would promise more than is kept.
    for kind in [rpc::Type::ListVolumesPublishedNodes, rpc::Type::VolumeCondition] {
        assert!(!told.contains(&kind), "{kind:?}");
    }
}
