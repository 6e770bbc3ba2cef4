//! What a node does, on every kind of host: the same scenarios over loop devices of this machine (`real_node`) and over a machine in
//! memory (`node_memory`). What a scenario needs of the machine around the node is [`Rig`].

#![allow(dead_code, unused_imports, unused_macros, reason = "each test binary uses a part of it")]

pub(crate) mod encrypted;
pub(crate) mod faults;
pub(crate) mod finding;
pub(crate) mod formatting;
pub(crate) mod growth;
pub(crate) mod health;
pub(crate) mod kinds;
pub(crate) mod life;
pub(crate) mod sharing;

use std::{io, sync::Arc, time::Duration};

use proxmox_csi::{
    csi::proto,
    host::{
        Host,
        luks::{KeyCost, Passphrase, Pbkdf},
    },
    node::{Access, Expand, MountFlags, MountPath, Node, NodeOptions, Publish, Stage, Unpublish, Unstage},
    types::{
        Bytes, ScsiSlot, VolumeHandle, Wwn,
        params::FilesystemOptions,
        publish::{Contents, PublishedDisk},
        sharing::Sharing,
    },
};

pub(crate) const MIB: u64 = 1 << 20;

/// A machine, the hypervisor under it, and the people and pods on it. Everything that a rig makes it takes away when it is dropped.
pub(crate) trait Rig: Sized {
    /// What a volume held at some time.
    type Copy;
    /// A process that keeps all mounts in a namespace of its own while this lives.
    type Holder;

    /// A machine beside those of other tests.
    async fn new() -> Self;
    /// A machine while there is no other: for scenarios that copy the mount namespace, and with it what others mounted.
    async fn alone() -> Self;
    fn node(&self) -> &Node;
    fn host(&self) -> Arc<dyn Host>;
    /// The node after a restart of its process.
    fn restarted(&self) -> Node;
    /// A path on the machine.
    fn path(&self, name: &str) -> MountPath;

    // The hypervisor.

    /// A volume that the hypervisor has plugged in, of zeros where it is new; the kernel has it as well.
    fn attach(&self, name: &str, lun: u8, size: u64) -> Volume;
    /// The same, and the kernel never heard of it.
    fn attach_unseen(&self, name: &str, lun: u8, size: u64) -> Volume;
    /// The hypervisor takes the disk away, whatever the guest does with it.
    fn detach(&self, volume: &Volume);
    /// The hypervisor grows the disk; the kernel learns of it when it asks.
    fn resize(&self, volume: &Volume, size: u64);

    // What the kernel sees.

    /// Makes a disk answer another name.
    fn rename(&self, volume: &Volume, wwn: Wwn);
    /// The disk takes no writes any more.
    fn write_protect(&self, volume: &Volume);
    /// The kernel puts the disk in a state.
    fn set_state(&self, volume: &Volume, state: &str);
    /// Sysfs says another size than the disk has.
    fn list_size(&self, volume: &Volume, size: u64);
    /// The disk can't be read any more from a place on.
    fn break_from(&self, volume: &Volume, offset: u64);
    /// The name of the disk.
    fn disk_of(&self, volume: &Volume) -> String;
    /// Gives the node below `/dev` of a disk another name.
    fn move_node(&self, name: &str, to: &str);
    /// The names of the disks that the kernel has.
    fn kernel_disks(&self) -> Vec<String>;
    /// The names of the open mappings.
    fn mapped(&self) -> Vec<String>;
    /// Whether nothing in the kernel holds the disk of a volume.
    fn is_free(&self, volume: &Volume) -> bool;
    /// The paths of the mounts at and below a path, in the order of mounting.
    fn mounts_below(&self, path: &MountPath) -> Vec<String>;
    /// The same for all that the scenario can have mounted.
    fn mounts(&self) -> Vec<String> {
        self.mounts_below(&self.path(""))
    }
    /// Whether this process may do what growing a mounted ext4 needs.
    fn may_grow_ext4(&self) -> bool;

    // What is in the volume, behind everybody's back.

    fn poke(&self, volume: &Volume, offset: u64, bytes: &[u8]);
    fn peek(&self, volume: &Volume, offset: u64, length: usize) -> Vec<u8>;
    fn is_blank(&self, volume: &Volume) -> bool;
    fn copy(&self, volume: &Volume) -> Self::Copy;
    fn is_same(&self, volume: &Volume, copy: &Self::Copy) -> bool;
    fn put_back(&self, volume: &Volume, copy: Self::Copy);
    /// Makes a file system by its own mkfs.
    fn mkfs(&self, volume: &Volume, fs: &str);
    /// Damages the file system: a little, so that a check mends it, or beyond that; `marked` with the mark of an error.
    fn damage(&self, volume: &Volume, fs: &str, beyond: bool, marked: bool);
    /// Whether the ext4 in it says that it is clean.
    fn is_clean(&self, volume: &Volume) -> bool;
    /// Writes a LUKS header with [`KEY`], by hand.
    fn encrypt(&self, volume: &Volume);
    /// Whether the passphrase opens the volume.
    fn opens(&self, volume: &Volume, passphrase: &str) -> bool;
    /// Looks at what an encrypted volume leaves where others could read it; `staged` while it is.
    fn inspect_encrypted(&self, _: &Volume, _staged: bool) {}

    // Pods and people.

    fn write(&self, directory: &MountPath, text: &str) -> io::Result<()>;
    fn read(&self, directory: &MountPath) -> io::Result<String>;
    /// Writes to the disk whose node is at a path.
    fn write_disk(&self, path: &MountPath, offset: u64, bytes: &[u8]) -> io::Result<()>;
    fn exists(&self, path: &MountPath) -> bool;
    fn sync(&self);
    fn make_directory(&self, path: &MountPath);
    fn link(&self, path: &MountPath, to: &MountPath);
    fn mount_tmpfs(&self, path: &MountPath);
    fn bind(&self, from: &MountPath, to: &MountPath);
    fn unmount(&self, path: &MountPath);
    fn set_shared(&self, path: &MountPath, shared: bool);
    async fn hold_all_mounts(&self) -> Self::Holder;
    /// The file system that is mounted there meets an error: an XFS shuts itself down, an ext4 takes no more writes.
    fn fail_filesystem(&self, volume: &Volume, fs: &str);
    /// Opens the encrypted disk with [`KEY`] and mounts the XFS in it, as the driver before this one did; the key is in the keyring.
    async fn open_as_before(&self, volume: &Volume);
}

/// Every byte counts: also the one that would end a line or a C string.
pub(crate) const KEY: &str = "s3cret\npass\0phrase ";

/// How the node is run in these tests.
pub(crate) fn node_options() -> NodeOptions {
    let mut node = NodeOptions::new("node-1");
    node.find_timeout = Duration::from_secs(3);
    node.size_timeout = Duration::from_secs(3);
    node.key_cost = KeyCost { pbkdf: Pbkdf::Pbkdf2, iterations: Some(1000), ..KeyCost::default() };
    node
}

/// A volume as a caller knows it.
#[derive(Clone)]
pub(crate) struct Volume {
    pub(crate) name: String,
    pub(crate) handle: String,
    pub(crate) published: PublishedDisk,
    pub(crate) staging: MountPath,
}

impl Volume {
    /// A new volume of this name in the slot, allocated blank, staged at a path.
    pub(crate) fn new(name: &str, lun: u8, size: u64, staging: MountPath) -> Self {
        let volume = format!("region//rbd/vm-9999-{name}");
        let handle: VolumeHandle = volume.parse().expect("a handle");
        let published = PublishedDisk {
            wwn: Wwn::of_volume(&handle.region, None, &handle.volid),
            slot: ScsiSlot::new(lun),
            size: Some(Bytes::new(size)),
            contents: Contents::Blank,
        };
        Self { name: name.to_owned(), handle: volume, published, staging }
    }

    pub(crate) fn stage(&self, fs: &str) -> Stage {
        Stage {
            volume: self.handle.clone(),
            staging: self.staging.clone(),
            disk: self.published.clone(),
            access: filesystem(fs),
            sharing: Sharing::OneNode,
            options: FilesystemOptions::default(),
            key: None,
        }
    }

    pub(crate) fn stage_encrypted(&self, fs: &str, passphrase: &str) -> Stage {
        Stage { key: Some(Passphrase::new(passphrase)), ..self.stage(fs) }
    }

    pub(crate) fn stage_block(&self) -> Stage {
        Stage { access: Access::Block, ..self.stage("ext4") }
    }

    pub(crate) fn publish(&self, target: &MountPath) -> Publish {
        Publish {
            volume: self.handle.clone(),
            staging: self.staging.clone(),
            target: target.clone(),
            disk: self.published.clone(),
            access: filesystem("ext4"),
            sharing: Sharing::OneNode,
            readonly: false,
            encrypted: false,
        }
    }

    pub(crate) fn publish_block(&self, target: &MountPath) -> Publish {
        Publish { access: Access::Block, ..self.publish(target) }
    }

    pub(crate) fn unpublish(&self, target: &MountPath) -> Unpublish {
        Unpublish { volume: self.handle.clone(), target: target.clone() }
    }

    pub(crate) fn unstage(&self) -> Unstage {
        Unstage { volume: self.handle.clone(), staging: self.staging.clone() }
    }

    pub(crate) fn expand(&self, path: &MountPath, size: u64) -> Expand {
        let (required, path) = (Some(Bytes::new(size)), path.clone());
        Expand { volume: self.handle.clone(), path, required, limit: None, key: None }
    }

    /// The request that stages it.
    pub(crate) fn stage_request(&self, fs: &str) -> proto::NodeStageVolumeRequest {
        proto::NodeStageVolumeRequest {
            volume_id: self.handle.clone(),
            publish_context: self.published.to_context(),
            staging_target_path: self.staging.to_string(),
            volume_capability: Some(mount_capability(fs)),
            ..proto::NodeStageVolumeRequest::default()
        }
    }
}

/// A file system for one node.
pub(crate) fn mount_capability(fs: &str) -> proto::VolumeCapability {
    use proto::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
    let mount = MountVolume { fs_type: fs.to_owned(), ..MountVolume::default() };
    proto::VolumeCapability {
        access_type: Some(AccessType::Mount(mount)),
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
    }
}

pub(crate) fn filesystem(fs: &str) -> Access {
    Access::Filesystem { kind: Some(fs.parse().expect("a file system")), flags: MountFlags::default() }
}

/// Asserts that nothing of any volume is left on the node.
pub(crate) fn assert_clean(rig: &impl Rig) {
    assert_eq!((rig.mounts(), rig.kernel_disks(), rig.mapped()), (vec![], vec![], vec![]));
}

/// Hands the scenarios to a macro that makes tests of them: the one list of them.
macro_rules! every_scenario {
    ($make_tests:ident) => {
        $make_tests! {
            finding::p3_a_volume_is_found_by_what_the_device_answers,
            finding::a_disk_the_kernel_never_heard_of_is_found_by_a_scan_of_its_lun,
            finding::p3_two_disks_with_one_wwn_are_refused,
            finding::p3_a_disk_of_another_size_is_refused,
            finding::p3_a_node_that_is_another_device_is_refused,
            finding::p3_a_disk_of_the_driver_before_is_accepted_at_its_lun_only,
            finding::p3_an_attachment_of_another_volume_is_refused,
            finding::a_disk_whose_node_comes_late_is_waited_for,
            formatting::p4_a_disk_that_holds_data_is_never_formatted,
            formatting::p4_another_file_system_is_neither_mounted_nor_formatted_over,
            formatting::p4_a_volume_that_was_not_allocated_blank_is_never_formatted,
            formatting::p4_an_unreadable_disk_is_never_formatted,
            formatting::p4_an_xfs_whose_mkfs_was_cut_off_is_named_and_left_alone,
            formatting::an_xfs_that_an_older_kernel_could_not_mount_is_not_made,
            life::stage_is_idempotent,
            life::p8_data_survives_unstage_and_stage_without_a_detach,
            life::p8_unstage_leaves_nothing_behind,
            life::p8_a_disk_that_something_else_holds_is_not_taken_out,
            life::p8_a_late_unstage_accepts_a_missing_disk,
            life::p6_a_dropped_stage_call_runs_to_its_end,
            life::p6_both_handle_forms_of_a_volume_exclude_each_other,
            life::a_raw_block_volume_is_the_disk_itself,
            life::readonly_publish_is_read_only,
            life::what_is_not_staged_is_not_published,
            life::a_disk_that_was_pulled_while_mounted_is_staged_again,
            life::paths_may_lead_through_links,
            faults::p8_a_disk_that_the_kernel_has_given_up_is_unstaged,
            faults::p7_what_is_mounted_at_the_staging_path_and_is_no_volume_stays,
            faults::p3_a_directory_that_lost_its_mount_is_not_bound_for_a_pod,
            faults::a_disk_that_takes_no_writes_is_mounted_read_only,
            health::an_xfs_that_has_shut_itself_down_is_reported_and_refused,
            health::an_ext4_that_went_read_only_is_reported_and_refused_and_checked_when_it_is_staged_again,
            health::a_read_only_target_of_a_sound_volume_is_no_trouble,
            health::a_disk_that_is_gone_or_given_up_is_reported,
            health::the_capability_and_the_answers_agree,
            health::an_ext4_is_repaired_before_it_is_mounted_where_that_needs_no_answer,
            health::a_damaged_file_system_is_not_mounted_and_the_reason_is_told,
            health::a_log_that_waits_on_a_disk_that_takes_no_writes_is_told_and_not_passed_over,
            kinds::a_btrfs_lives_like_the_others,
            kinds::p3_two_btrfs_are_told_apart_and_a_dead_one_gives_way,
            growth::xfs_grows_online,
            growth::ext4_grows_online_or_says_which_capability_is_missing,
            growth::file_systems_grow_at_stage,
            sharing::a_volume_for_one_pod_has_one_target,
            sharing::p1_a_disk_that_several_nodes_read_is_never_one_that_could_be_written_to,
            sharing::a_volume_for_one_reader_is_mounted_read_only,
            sharing::p8_a_mount_that_is_seen_twice_is_unstaged_once,
            encrypted::p9_an_encrypted_volume_lives_with_its_passphrase_on_no_command_line,
            encrypted::a_wrong_passphrase_is_unauthenticated_and_leaves_nothing,
            encrypted::p9_an_empty_passphrase_is_none,
            encrypted::p4_a_volume_that_holds_anything_is_never_encrypted,
            encrypted::p4_what_is_inside_is_formatted_only_while_nothing_was_written_through_the_mapping,
            encrypted::an_encrypted_raw_block_volume_is_its_mapping,
            encrypted::what_a_pod_encrypts_in_its_raw_block_volume_is_its_own,
            encrypted::an_encrypted_file_system_grows_online_and_at_stage,
            encrypted::a_mapping_of_the_driver_before_is_served_grown_and_closed,
            encrypted::an_encrypted_disk_that_was_pulled_is_staged_again,
            encrypted::p8_the_mapping_of_a_raw_disk_that_was_pulled_and_came_back_goes_with_unstage,
            encrypted::a_stage_that_fails_inside_closes_what_it_opened,
        }
    };
}
pub(crate) use every_scenario;
