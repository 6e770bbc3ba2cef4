//! Who may use a volume at once: access modes through the controller's RPCs, over the simulator in process.

mod support;

use proxmox_csi::csi::proto::{
    self, controller_server::Controller as _, volume_capability::access_mode::Mode,
};
use support::{
    Bench, CSI, GIB, REGION, assert_refused, at, mount, new_volume, of_all_types, strings, with_mode,
};
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

async fn room(bench: &Bench, parameters: &[(&str, &str)], zone: Option<&str>) -> proto::GetCapacityResponse {
    let request = proto::GetCapacityRequest {
        volume_capabilities: vec![mount()],
        parameters: strings(parameters),
        accessible_topology: zone.map(|zone| at(REGION, zone)),
    };
    bench.controller.get_capacity(Request::new(request)).await.expect("an answer").into_inner()
}

#[tokio::test(start_paused = true)]
async fn capacity_counts_only_where_such_a_volume_can_be_made() {
    let bench = Bench::with(of_all_types(), CSI);
    for (storage, format, replicate, has_room) in [
        ("local", "raw", "false", true),
        ("local", "qcow2", "false", true),
        ("local", "raw", "true", false),
        ("a-lvmthin", "raw", "false", true),
        ("a-lvmthin", "qcow2", "false", false),
        ("a-rbd", "qcow2", "false", false),
        ("a-btrfs", "qcow2", "false", false),
        ("a-lvm", "raw", "false", false),
    ] {
        let parameters = [("storage", storage), ("storageFormat", format), ("replicate", replicate)];
        let told = room(&bench, &parameters, Some("pve1")).await;
        assert_eq!(told.available_capacity > GIB, has_room, "{parameters:?}: {told:?}");
        assert_eq!(told.maximum_volume_size.is_some_and(|most| most > GIB), has_room, "{parameters:?}");
        // What is told is what can be had.
        let mut new = new_volume("pvc-1", storage);
        new.parameters = strings(&parameters);
        let made = bench.create(new).await;
        assert_eq!(made.is_ok(), has_room, "{parameters:?}: {made:?}");
        if let Ok(volume) = made {
            bench.delete(&volume.volume_id).await.expect("deleted");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_largest_volume_is_what_one_place_has_and_the_room_is_that_of_all() {
    let bench = Bench::with(of_all_types(), CSI);
    // pve2 has less room than pve1.
    let form = "vmid=9999&filename=vm-9999-other&size=20G";
    bench.admin("POST", "/nodes/pve2/storage/a-zfspool/content", form).await;
    let of = |told: &proto::GetCapacityResponse| (told.available_capacity, told.maximum_volume_size);
    // What is left of a step is of no use to a volume.
    let in_steps = |bytes: i64| Some(bytes - bytes % (GIB / 2));
    let first = room(&bench, &[("storage", "a-zfspool")], Some("pve1")).await;
    let second = room(&bench, &[("storage", "a-zfspool")], Some("pve2")).await;
    let all = room(&bench, &[("storage", "a-zfspool")], None).await;
    assert!(second.available_capacity < first.available_capacity, "{first:?} {second:?}");
    assert_eq!(of(&first), (first.available_capacity, in_steps(first.available_capacity)));
    let both = first.available_capacity + second.available_capacity;
    assert_eq!(of(&all), (both, in_steps(first.available_capacity)));
    // A shared storage is one place, whoever looks at it.
    let shared = room(&bench, &[("storage", "shared")], None).await;
    assert_eq!(of(&shared), (shared.available_capacity, in_steps(shared.available_capacity)));
    assert_eq!(of(&shared), of(&room(&bench, &[("storage", "shared")], Some("pve2")).await));
    // A volume of that size can be made, and a larger one can't.
    let mut largest = new_volume("pvc-1", "shared");
    let most = shared.maximum_volume_size.expect("a size");
    largest.capacity_range = Some(proto::CapacityRange { required_bytes: most + 1, limit_bytes: 0 });
    assert_refused(bench.create(largest.clone()).await, Code::ResourceExhausted, &["`shared`"]);
    largest.capacity_range = Some(proto::CapacityRange { required_bytes: most, limit_bytes: 0 });
    bench.create(largest).await.expect("a volume of the largest size");
}

#[tokio::test(start_paused = true)]
async fn a_volume_is_confirmed_only_where_context_and_parameters_are_its_own() {
    let bench = Bench::new();
    let mut new = new_volume("pvc-1", "shared");
    new.parameters = strings(&[("storage", "shared"), ("storageFormat", "qcow2"), ("ssd", "true")]);
    let volume = bench.create(new.clone()).await.expect("a volume");
    let ask = async |context: &[(&str, &str)], parameters: &[(&str, &str)]| {
        let request = proto::ValidateVolumeCapabilitiesRequest {
            volume_id: volume.volume_id.clone(),
            volume_context: strings(context),
            volume_capabilities: vec![mount()],
            parameters: strings(parameters),
            ..Default::default()
        };
        let answer = bench.controller.validate_volume_capabilities(Request::new(request.clone())).await;
        let answer = answer.expect("an answer").into_inner();
        if let Some(confirmed) = &answer.confirmed {
            assert_eq!(confirmed.volume_context, request.volume_context);
            assert_eq!(confirmed.parameters, request.parameters);
        }
        (answer.confirmed.is_some(), answer.message)
    };
    let own = [("storage", "shared"), ("storageFormat", "qcow2"), ("ssd", "true")];
    for (context, parameters) in [(&own[..], &own[..]), (&[], &[]), (&own[..1], &own[..]), (&own, &[])] {
        assert_eq!(ask(context, parameters).await, (true, String::new()), "{context:?} {parameters:?}");
    }
    for (context, parameters, why) in [
        (&[("storage", "local")][..], &own[..], "context name storage `local`"),
        (&[("storage", "shared"), ("storageFormat", "raw")], &[], "context stand for a raw image"),
        (&own, &[("storage", "local"), ("storageFormat", "qcow2")], "parameters name storage `local`"),
        (&own, &own[..1], "parameters stand for a raw image"),
        (&own, &[own[0], own[1], ("replicate", "true")], "replicate"),
        (&own, &[own[0], own[1], ("cache", "fast")], "cache"),
    ] {
        let (confirmed, message) = ask(context, parameters).await;
        assert!(!confirmed && message.contains(why), "{context:?} {parameters:?}: {message}");
    }
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
