//! What holds of any input, one function for each kind of text that comes from outside. Each panics where it does not hold.
//!
//! The fuzz targets (`fuzz/targets`) and the tests beside this file call the same functions: what a fuzzer found is kept as a file of
//! `fuzz/corpus` and tried by the tests from then on.

use std::{
    collections::BTreeMap,
    fmt::{Debug, Display},
    fs,
    path::Path,
    str::FromStr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes as Body;
use percent_encoding::percent_decode_str;
use proxmox_csi::{
    config,
    host::{
        Host as _,
        linux::{LinuxHost, LinuxOptions, mountinfo},
    },
    pve::{Client, client::Token, qemu::Drive, transport::HttpRequest},
    telemetry::metrics::Metrics,
    types::{
        Bytes, Fingerprint, NodeName, Region, ScsiSlot, StorageId, Upid, VmId, VolId, VolumeHandle,
        VolumeName, Wwn, attributes::Attributes, params::Parameters, props::PropertyString,
        publish::PublishedDisk,
    },
};

/// A property by the name of its fuzz target.
pub(crate) type Property = fn(&[u8]);

/// All of them.
pub(crate) const ALL: [(&str, Property); 7] = [
    ("handles", handles),
    ("properties", properties),
    ("parameters", parameters),
    ("answers", answers),
    ("mounts", mounts),
    ("sysfs", sysfs),
    ("configs", configs),
];

/// Parses, prints what was parsed, and parses that again: the same value. Whether the text was one.
fn inverse<T: FromStr + Display + PartialEq + Debug>(text: &str) -> Option<T> {
    let value: T = text.parse().ok()?;
    let again = value.to_string().parse::<T>().ok();
    assert_eq!(again.as_ref(), Some(&value), "{text:?} is printed as {value}");
    Some(value)
}

/// Texts that name something: whatever is accepted is printed as something that is accepted as the same, and a handle or volid as it was.
pub(crate) fn handles(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(handle) = inverse::<VolumeHandle>(text) {
        assert_eq!(handle.to_string(), text, "a handle is never rewritten");
        in_urls(&handle.zone.clone().unwrap_or_else(|| "pve1".parse().expect("a node")), &handle.volid);
    }
    if let Some(volid) = inverse::<VolId>(text) {
        assert_eq!(volid.to_string(), text, "a volid is what Proxmox calls the volume");
        assert!(PropertyString::with_bare(text).is_ok(), "a volid can stand in a drive: {text:?}");
        in_urls(&"pve1".parse().expect("a node"), &volid);
    }
    for name in [
        inverse::<VolumeName>(text).map(|name| name.to_string()),
        inverse::<StorageId>(text).map(|id| id.to_string()),
        inverse::<NodeName>(text).map(|name| name.to_string()),
        inverse::<Region>(text).map(|name| name.to_string()),
    ]
    .into_iter()
    .flatten()
    {
        assert!(!name.contains([',', '=', ' ', '\n', '\0']) && !name.is_empty(), "{name:?}");
        assert!(!name.split('/').any(|part| part == ".." || part == "."), "{name:?} leaves its directory");
    }
    if let Some(wwn) = inverse::<Wwn>(text) {
        assert_eq!(wwn.wwid().parse::<Wwn>().ok().or(Some(wwn)), Some(wwn));
    }
    inverse::<ScsiSlot>(text);
    inverse::<Upid>(text);
    inverse::<VmId>(text);
    inverse::<Fingerprint>(text);
    let _ = text.parse::<Bytes>();
}

/// Property strings as Proxmox has them in configs: what is read is written as what is read as the same.
pub(crate) fn properties(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(mut read) = inverse::<PropertyString>(text) {
        let before: Vec<(String, String)> =
            read.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        // What cannot be one value is refused, whatever stands there already.
        for value in ["a,b=c", "a b", "a\nb", ""] {
            assert!(read.set("cache", value).is_err(), "{value:?} was let in");
        }
        let after: Vec<(String, String)> =
            read.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        assert_eq!(before, after, "what was refused changed something");
        read.set("wwn", "0x3c51aabbccddeeff").expect("a legal value");
        assert_eq!(read.get("wwn"), Some("0x3c51aabbccddeeff"));
    }
    if let Some(drive) = Drive::read(text) {
        let _ = (drive.volid(), drive.size(), drive.is_read_only());
    }
    // `text` as a value: it stays one.
    let mut drive = PropertyString::with_bare("local:9999/vm-9999-a.raw").expect("a volid");
    if drive.set("serial", text).is_ok() {
        let printed = drive.to_string();
        assert_eq!(printed.split(',').count(), 2, "{text:?} brought a property with it: {printed}");
        assert_eq!(printed.parse::<PropertyString>().expect("it was printed").get("serial"), Some(text));
    }
}

/// `key=value` lines, as a StorageClass, a volume context, a VolumeAttributesClass or a publish context.
pub(crate) fn parameters(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let map: BTreeMap<String, String> = text
        .split('\n')
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    // No existing volume is refused.
    let (lenient, _) = Parameters::of_existing_volume(&map);
    drive_of(&lenient);
    if let Ok((strict, _)) = Parameters::of_new_volume(&map) {
        drive_of(&strict);
        assert_eq!(strict, lenient, "one parameter, two meanings");
    }
    let known = Attributes::parse_known(&map);
    if let Ok(attributes) = Attributes::parse(&map) {
        assert_eq!(Attributes::parse(&attributes.to_map()).as_ref(), Ok(&attributes));
        assert_eq!(attributes, known);
        let mut changed = lenient.clone();
        attributes.apply_to(&mut changed.drive);
        drive_of(&changed);
    }
    if let Ok(disk) = PublishedDisk::from_context(&map) {
        assert_eq!(PublishedDisk::from_context(&disk.to_context()).as_ref(), Ok(&disk));
    }
}

/// The drive that parameters make has the keys that it may have, and its volume is the volume.
fn drive_of(parameters: &Parameters) {
    const VOLID: &str = "local:9999/vm-9999-a.raw";
    let mut drive = PropertyString::with_bare(VOLID).expect("a volid");
    parameters.drive.write_to(&mut drive).expect("all values of parameters are legal");
    let read: PropertyString = drive.to_string().parse().expect("it was printed");
    assert_eq!(read, drive);
    assert_eq!(read.bare(), Some(VOLID));
    for (key, value) in read.iter() {
        let legal = match key {
            "backup" | "iothread" | "replicate" | "ssd" => matches!(value, "0" | "1"),
            "discard" => value == "on",
            "aio" => matches!(value, "native" | "threads" | "io_uring"),
            "cache" => matches!(value, "none" | "writethrough" | "writeback" | "unsafe" | "directsync"),
            "iops_rd" | "iops_wr" | "mbps_rd" | "mbps_wr" => value.parse::<u32>().is_ok(),
            _ => false,
        };
        assert!(legal, "a drive got {key}={value}");
    }
}

/// What was asked, in order.
type Asked = Arc<Mutex<Vec<HttpRequest>>>;

/// A client whose every request is answered by `body`, and what was asked of it.
fn client(status: u16, body: &[u8]) -> (Client, Asked) {
    let asked = Asked::default();
    let (body, noted) = (Body::copy_from_slice(body), Arc::clone(&asked));
    let server = tower::service_fn(move |request: HttpRequest| {
        let mut requests = noted.lock().expect("no panic");
        requests.push(request);
        // A task that never ends would be asked for until it is given up; so long a history shows nothing new.
        let gone = requests.len() > 50;
        let status = if gone { 500 } else { status };
        let answer = http::Response::builder().status(status).body(body.clone()).expect("a legal status");
        async move { Ok(answer) }
    });
    let region = "test".parse().expect("a region");
    let token =
        Token { id: "csi@pve!csi".to_owned(), secret: "00000000-0000-4000-8000-000000000000".to_owned() };
    let transport = tower::util::BoxCloneSyncService::new(server);
    (Client::new(region, transport, &token, Metrics::default()).expect("a legal token"), asked)
}

/// Runs on a clock that stands still but for what is waited for.
fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(work)
}

/// The segments of a path, and the pairs of a form.
type Expected<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)]);

/// Names in requests: each stays in its place, whatever it holds.
fn in_urls(node: &NodeName, volid: &VolId) {
    let (client, asked) = client(200, br#"{"data":null}"#);
    let vmid = VmId::new(100).expect("a VMID");
    let drive = PropertyString::with_bare(&volid.to_string()).expect("a volid is one value");
    run(async {
        let _ = client.volume(node, volid).await;
        let _ = client.delete_volume(node, volid).await;
        let _ = client.list_owned(node, &volid.storage, vmid).await;
        let _ = client.allocate(node, &volid.storage, vmid, &volid.name.to_string(), 1024).await;
        let slot = ScsiSlot::new(1).expect("a slot");
        let _ = client.set_drive(node, vmid, slot, &drive, "0123").await;
    });
    let (storage, name) = (volid.storage.to_string(), volid.name.to_string());
    let (of_node, volid) = (node.to_string(), volid.to_string());
    let content = ["api2", "json", "nodes", &of_node, "storage", &storage, "content"];
    let one: Vec<&str> = content.iter().copied().chain([volid.as_str()]).collect();
    let config = ["api2", "json", "nodes", &of_node, "qemu", "100", "config"];
    let expected: [Expected<'_>; 5] = [
        (&one, &[]),
        (&one, &[]),
        (&content, &[("content", "images"), ("vmid", "100")]),
        (&content, &[("vmid", "100"), ("filename", &name), ("size", "1024")]),
        (&config, &[("digest", "0123"), ("scsi1", &volid)]),
    ];
    let asked = asked.lock().expect("no panic");
    assert_eq!(asked.len(), expected.len());
    for (request, (path, form)) in asked.iter().zip(expected) {
        let segments: Vec<String> = request.uri().path().split('/').skip(1).map(decoded).collect();
        assert_eq!(segments, path, "{}", request.uri());
        let text = match request.uri().query() {
            Some(query) => query.to_owned(),
            None => String::from_utf8(request.body().to_vec()).expect("text"),
        };
        let mut read: Vec<(String, String)> = text
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| pair.split_once('=').expect("a pair"))
            .map(|(key, value)| (decoded(key), decoded(value)))
            .collect();
        let mut form: Vec<(String, String)> =
            form.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        read.sort();
        form.sort();
        assert_eq!(read, form, "{text}");
    }
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8().expect("text").into_owned()
}

/// The first byte says what is asked, the second with which status it is answered; the rest is the answer. Nothing panics, and whoever
/// waits for a task is answered in the end.
pub(crate) fn answers(data: &[u8]) {
    let Some((&[call, status], body)) = data.split_first_chunk() else { return };
    let status = [200, 200, 200, 400, 403, 500, 595][usize::from(status) % 7];
    let (client, _) = client(status, body);
    let (node, vmid): (NodeName, _) = ("pve1".parse().expect("a node"), VmId::new(100).expect("a VMID"));
    let storage: StorageId = "local".parse().expect("a storage");
    let volid: VolId = "local:9999/vm-9999-a.raw".parse().expect("a volid");
    let upid = "UPID:pve1:000000F9:000003A4:6A5C7B1E:qmconfig:100:csi@pve!csi:".parse().expect("a UPID");
    run(async {
        match call % 18 {
            0 => {
                if let Ok(resources) = client.resources().await {
                    let _ = (resources.is_quorate(), resources.sight(), resources.vm(vmid));
                    assert!(resources.storages.iter().all(|row| row.free() <= row.total));
                }
            }
            1 => {
                if let Ok(config) = client.vm_config(&node, vmid).await {
                    assert!(
                        !config.digest().is_empty(),
                        "a config without a digest can not be changed safely"
                    );
                    let _ = (config.uuid(), config.lock(), config.is_protected(), config.hotplugs_disks());
                    let _ = (config.holders_of(&volid).count(), config.volumes().count());
                    let _ = (config.current_drives().count(), config.scsi_hardware());
                }
            }
            2 => drop(client.vm_status(&node, vmid).await),
            3 => drop(client.permissions().await.map(|all| all.gaps_below("/vms", "VM.Audit").count())),
            4 => drop(client.missing_privileges().await),
            5 => drop(client.volume(&node, &volid).await),
            6 => {
                for (name, _) in client.list_owned(&node, &storage, vmid).await.unwrap_or_default() {
                    let volid = VolId { storage: storage.clone(), name };
                    assert_eq!(volid.to_string().parse(), Ok(volid));
                }
            }
            7 => drop(client.storage_status(&node, &storage).await),
            8 => drop(client.storage_notices_loss(&storage).await),
            9 => drop(client.snapshots(&node, vmid).await),
            10 => drop(client.snapshot_volumes(&node, vmid, "before").await),
            11 => {
                let allocated = client.allocate(&node, &storage, vmid, "vm-9999-a.raw", 1024).await;
                drop(allocated.map(|volid| assert_eq!(volid.to_string().parse(), Ok(volid))));
            }
            12 => drop(client.wait("test", &upid, Duration::from_mins(1)).await),
            13 => drop(client.next_free_vmid().await),
            14 => drop(client.vmid_exists(vmid).await),
            15 => drop(client.recent_tasks(&node, vmid, 10).await),
            16 => drop(client.storage_configs().await),
            _ => drop(client.contents(&node, &storage, None).await),
        }
    });
}

/// A mount table.
pub(crate) fn mounts(data: &[u8]) {
    let mounts = mountinfo::mounts(data);
    assert!(mounts.len() <= data.split(|byte| *byte == b'\n').count());
    for mount in mounts {
        assert!(!mount.fs.contains(' '));
    }
}

/// Where `data` is put: pieces of it, cut at the byte 0xff, one after the other.
const SYSFS: [&str; 14] = [
    "block/sda/dev",
    "block/sda/size",
    "block/sda/ro",
    "block/sda/device/wwid",
    "block/sda/device/vpd_pg83",
    "block/sda/device/vpd_pg80",
    "block/sda/device/state",
    "class/scsi_host/host1/proc_name",
    "class/dmi/id/product_uuid",
    "class/dmi/id/product_serial",
    "class/dmi/id/sys_vendor",
    "class/dmi/id/product_name",
    "class/scsi_host/host1/device/driver_override",
    "block/sda/slaves/sdb/dev",
];

/// The tree that a kernel shows of its disks and its machine.
pub(crate) fn sysfs(data: &[u8]) {
    let root = tempfile::tempdir().expect("a directory");
    let pieces: Vec<&[u8]> = data.split(|byte| *byte == 0xff).collect();
    let lun = pieces.first().map_or("0", |piece| std::str::from_utf8(piece).unwrap_or("0"));
    let address: String = lun.chars().filter(|c| !matches!(c, '/' | '\0')).take(64).collect();
    let device =
        root.path().join("devices/host1").join(if address.is_empty() { "1:0:0:1" } else { &address });
    fs::create_dir_all(&device).expect("a directory");
    for directory in ["block/sda/slaves/sdb", "class/scsi_host/host1/device", "class/dmi/id"] {
        fs::create_dir_all(root.path().join(directory)).expect("a directory");
    }
    let _ = std::os::unix::fs::symlink(&device, root.path().join("block/sda/device"));
    for (path, piece) in SYSFS.iter().zip(pieces.iter().skip(1)) {
        let _ = fs::write(root.path().join(path), piece);
    }
    read_tree(root.path());
}

fn read_tree(root: &Path) {
    let options =
        LinuxOptions { sysfs_root: root.into(), dev_root: root.join("dev"), ..LinuxOptions::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let host = LinuxHost::new(options);
        if let Ok(disks) = host.disks().await {
            assert!(disks.len() <= 1, "one device, {disks:?}");
            for disk in &disks {
                assert_eq!(disk.size.get() % 512, 0);
                assert!(!disk.to_string().is_empty());
            }
        }
        let _ = host.identity().await;
    });
}

/// A configuration file and a file of nodes.
pub(crate) fn configs(data: &[u8]) {
    // Files that it names are read: only such as there are none of.
    if data.windows(5).any(|part| matches!(part, b"/dev/" | b"/proc" | b"/sys/")) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("config.yaml");
    fs::write(&path, data).expect("a file");
    // A secret that stands where secrets stand, and only there, is neither printed nor quoted.
    let text = String::from_utf8_lossy(data);
    let kept = text.matches(SECRET).count() == 1
        && ["token_secret: ", "password: "].iter().any(|key| text.contains(&format!("{key}{SECRET}")));
    let said = match config::read(&path) {
        Ok(config) => {
            assert!(!config.clusters.is_empty() && config.clusters.iter().all(|one| !one.urls.is_empty()));
            format!("{config:?}")
        }
        Err(error) => error.to_string(),
    };
    assert!(!kept || !said.contains(SECRET), "a secret is said: {said}");
    let _ = config::NodesFile::open(&path);
}

/// The secret in the files of the corpus.
const SECRET: &str = "s3cret-of-the-corpus";
