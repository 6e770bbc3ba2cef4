//! The calls the simulator models: path, who may make them, parameters (the API schema of pve-manager 9.2).

use crate::sim::rules::access::Access;
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::{Kind, Param, Params, VMID, verify};
use percent_encoding::percent_decode_str;

/// Everything a call can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Version,
    Resources,
    NextId,
    ClusterStatus,
    Nodes,
    Permissions,
    StorageList,
    StorageStatus,
    ContentList,
    Alloc,
    VolumeGet,
    VolumeDelete,
    VmList,
    VmCreate,
    VmDestroy,
    ConfigGet,
    ConfigPut,
    ConfigPost,
    Pending,
    Unlink,
    Resize,
    StatusCurrent,
    Start,
    Stop,
    SnapshotList,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotConfig,
    TaskList,
    TaskStatus,
    TaskLog,
}

/// Who may make a call, checked before anything else is looked at.
enum Need {
    /// Every user; the call looks further itself.
    Anyone,
    /// One of these on the VM in the path.
    Vm(&'static [&'static str]),
    /// One of these on the storage in the path.
    Storage(&'static [&'static str]),
}

/// A call.
pub(super) struct Route {
    method: &'static str,
    pattern: &'static str,
    pub(super) act: Act,
    need: Need,
    /// Whether pveproxy hands it on to pvedaemon (`protected`).
    pub(super) forwarded: bool,
    config_keys: bool,
    params: &'static [Param],
}

const ANY_CONFIG: &[&str] = &[
    "VM.Config.Disk",
    "VM.Config.CDROM",
    "VM.Config.CPU",
    "VM.Config.Memory",
    "VM.Config.Network",
    "VM.Config.HWType",
    "VM.Config.Options",
    "VM.Config.Cloudinit",
];
const UPDATE: &[Param] = &[
    Param("digest", Kind::AtMost(40), false),
    Param("delete", Kind::KeyList, false),
    Param("revert", Kind::KeyList, false),
    Param("force", Kind::Boolean, false),
    Param("skiplock", Kind::Boolean, false),
];
const UPDATE_LATER: &[Param] = &[
    Param("digest", Kind::AtMost(40), false),
    Param("delete", Kind::KeyList, false),
    Param("revert", Kind::KeyList, false),
    Param("force", Kind::Boolean, false),
    Param("skiplock", Kind::Boolean, false),
    Param("background_delay", Kind::Integer(1, 30), false),
];
const FORMATS: &[&str] = &["raw", "qcow2", "subvol", "vmdk"];
const FOREVER: i64 = i64::MAX;

const fn route(
    method: &'static str,
    pattern: &'static str,
    act: Act,
    need: Need,
    forwarded: bool,
    params: &'static [Param],
) -> Route {
    Route { method, pattern, act, need, forwarded, config_keys: false, params }
}

const fn taking_config_keys(mut route: Route) -> Route {
    route.config_keys = true;
    route
}

const VM: &str = "/nodes/{node}/qemu/{vmid}";

static ROUTES: &[Route] = &[
    route("GET", "/version", Act::Version, Need::Anyone, false, &[]),
    route(
        "GET",
        "/cluster/resources",
        Act::Resources,
        Need::Anyone,
        false,
        &[Param("type", Kind::OneOf(&["vm", "storage", "node", "sdn"]), false)],
    ),
    route("GET", "/cluster/nextid", Act::NextId, Need::Anyone, false, &[Param("vmid", VMID, false)]),
    route("GET", "/cluster/status", Act::ClusterStatus, Need::Anyone, true, &[]),
    route("GET", "/nodes", Act::Nodes, Need::Anyone, false, &[]),
    route(
        "GET",
        "/access/permissions",
        Act::Permissions,
        Need::Anyone,
        false,
        &[Param("path", Kind::Text, false), Param("userid", Kind::Text, false)],
    ),
    route(
        "GET",
        "/nodes/{node}/storage",
        Act::StorageList,
        Need::Anyone,
        true,
        &[
            Param("content", Kind::Text, false),
            Param("enabled", Kind::Boolean, false),
            Param("format", Kind::Boolean, false),
            Param("storage", Kind::Text, false),
            Param("target", Kind::Text, false),
        ],
    ),
    route(
        "GET",
        "/nodes/{node}/storage/{storage}/status",
        Act::StorageStatus,
        Need::Storage(&["Datastore.Audit", "Datastore.AllocateSpace"]),
        true,
        &[],
    ),
    route(
        "GET",
        "/nodes/{node}/storage/{storage}/content",
        Act::ContentList,
        Need::Storage(&["Datastore.Audit", "Datastore.AllocateSpace"]),
        true,
        &[Param("content", Kind::Text, false), Param("vmid", VMID, false)],
    ),
    route(
        "POST",
        "/nodes/{node}/storage/{storage}/content",
        Act::Alloc,
        Need::Storage(&["Datastore.AllocateSpace"]),
        true,
        &[
            Param("vmid", VMID, true),
            Param("filename", Kind::Text, true),
            Param("size", Kind::AllocSize, true),
            Param("format", Kind::OneOf(FORMATS), false),
        ],
    ),
    route(
        "GET",
        "/nodes/{node}/storage/{storage}/content/{volume*}",
        Act::VolumeGet,
        Need::Anyone,
        true,
        &[],
    ),
    route(
        "DELETE",
        "/nodes/{node}/storage/{storage}/content/{volume*}",
        Act::VolumeDelete,
        Need::Anyone,
        true,
        &[Param("delay", Kind::Integer(1, 30), false)],
    ),
    route(
        "GET",
        "/nodes/{node}/qemu",
        Act::VmList,
        Need::Anyone,
        true,
        &[Param("full", Kind::Boolean, false)],
    ),
    taking_config_keys(route(
        "POST",
        "/nodes/{node}/qemu",
        Act::VmCreate,
        Need::Anyone,
        true,
        &[Param("vmid", VMID, true), Param("pool", Kind::Text, false), Param("start", Kind::Boolean, false)],
    )),
    route(
        "DELETE",
        VM,
        Act::VmDestroy,
        Need::Vm(&["VM.Allocate"]),
        true,
        &[
            Param("purge", Kind::Boolean, false),
            Param("destroy-unreferenced-disks", Kind::Boolean, false),
            Param("skiplock", Kind::Boolean, false),
        ],
    ),
    route(
        "GET",
        "/nodes/{node}/qemu/{vmid}/config",
        Act::ConfigGet,
        Need::Vm(&["VM.Audit"]),
        false,
        &[Param("current", Kind::Boolean, false), Param("snapshot", Kind::AtMost(40), false)],
    ),
    taking_config_keys(route(
        "PUT",
        "/nodes/{node}/qemu/{vmid}/config",
        Act::ConfigPut,
        Need::Vm(ANY_CONFIG),
        true,
        UPDATE,
    )),
    taking_config_keys(route(
        "POST",
        "/nodes/{node}/qemu/{vmid}/config",
        Act::ConfigPost,
        Need::Vm(ANY_CONFIG),
        true,
        UPDATE_LATER,
    )),
    route("GET", "/nodes/{node}/qemu/{vmid}/pending", Act::Pending, Need::Vm(&["VM.Audit"]), false, &[]),
    route(
        "PUT",
        "/nodes/{node}/qemu/{vmid}/unlink",
        Act::Unlink,
        Need::Vm(&["VM.Config.Disk"]),
        true,
        &[Param("idlist", Kind::KeyList, true), Param("force", Kind::Boolean, false)],
    ),
    route(
        "PUT",
        "/nodes/{node}/qemu/{vmid}/resize",
        Act::Resize,
        Need::Vm(&["VM.Config.Disk"]),
        true,
        &[
            Param("disk", Kind::DriveKey, true),
            Param("size", Kind::ResizeSize, true),
            Param("digest", Kind::AtMost(40), false),
            Param("skiplock", Kind::Boolean, false),
        ],
    ),
    route(
        "GET",
        "/nodes/{node}/qemu/{vmid}/status/current",
        Act::StatusCurrent,
        Need::Vm(&["VM.Audit"]),
        true,
        &[],
    ),
    route(
        "POST",
        "/nodes/{node}/qemu/{vmid}/status/start",
        Act::Start,
        Need::Vm(&["VM.PowerMgmt"]),
        true,
        &[Param("skiplock", Kind::Boolean, false), Param("timeout", Kind::Integer(0, FOREVER), false)],
    ),
    route(
        "POST",
        "/nodes/{node}/qemu/{vmid}/status/stop",
        Act::Stop,
        Need::Vm(&["VM.PowerMgmt"]),
        true,
        &[Param("skiplock", Kind::Boolean, false), Param("timeout", Kind::Integer(0, FOREVER), false)],
    ),
    route("GET", "/nodes/{node}/qemu/{vmid}/snapshot", Act::SnapshotList, Need::Vm(&["VM.Audit"]), true, &[]),
    route(
        "POST",
        "/nodes/{node}/qemu/{vmid}/snapshot",
        Act::SnapshotCreate,
        Need::Vm(&["VM.Snapshot"]),
        true,
        &[
            Param("snapname", Kind::AtMost(40), true),
            Param("description", Kind::Text, false),
            Param("vmstate", Kind::Boolean, false),
        ],
    ),
    route(
        "DELETE",
        "/nodes/{node}/qemu/{vmid}/snapshot/{snapname}",
        Act::SnapshotDelete,
        Need::Vm(&["VM.Snapshot"]),
        true,
        &[Param("force", Kind::Boolean, false)],
    ),
    route(
        "GET",
        "/nodes/{node}/qemu/{vmid}/snapshot/{snapname}/config",
        Act::SnapshotConfig,
        Need::Vm(&["VM.Snapshot", "VM.Snapshot.Rollback", "VM.Audit"]),
        false,
        &[],
    ),
    route(
        "GET",
        "/nodes/{node}/tasks",
        Act::TaskList,
        Need::Anyone,
        false,
        &[
            Param("errors", Kind::Boolean, false),
            Param("limit", Kind::Integer(0, FOREVER), false),
            Param("since", Kind::Integer(0, FOREVER), false),
            Param("source", Kind::OneOf(&["archive", "active", "all"]), false),
            Param("start", Kind::Integer(0, FOREVER), false),
            Param("typefilter", Kind::Text, false),
            Param("until", Kind::Integer(0, FOREVER), false),
            Param("userfilter", Kind::Text, false),
            Param("vmid", VMID, false),
        ],
    ),
    route("GET", "/nodes/{node}/tasks/{upid}/status", Act::TaskStatus, Need::Anyone, true, &[]),
    route(
        "GET",
        "/nodes/{node}/tasks/{upid}/log",
        Act::TaskLog,
        Need::Anyone,
        true,
        &[Param("start", Kind::Integer(0, FOREVER), false), Param("limit", Kind::Integer(0, FOREVER), false)],
    ),
];

const IN_PATH: &[Param] = &[
    Param("node", Kind::Text, false),
    Param("storage", Kind::Text, false),
    Param("volume", Kind::Text, false),
    Param("vmid", VMID, false),
    Param("upid", Kind::Text, false),
    Param("snapname", Kind::AtMost(40), false),
];

/// The route of a call and the parameters in its path.
pub(super) fn find(method: &str, path: &str) -> Option<(&'static Route, Params)> {
    ROUTES
        .iter()
        .filter(|route| route.method == method)
        .find_map(|route| matches(route.pattern, path).map(|params| (route, params)))
}

fn matches(pattern: &str, path: &str) -> Option<Params> {
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let mut params = Params::new();
    let mut rest: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    rest.reverse();
    for step in pattern.split('/').filter(|step| !step.is_empty()) {
        match step.strip_prefix('{').and_then(|step| step.strip_suffix('}')) {
            // The rest of the path: a volume id may stand there unencoded, with its slash.
            Some(name) if name.ends_with('*') => {
                rest.reverse();
                let value = decode(&rest.join("/"));
                (!value.is_empty()).then_some(())?;
                params.insert(name.trim_end_matches('*').to_owned(), value);
                return Some(params);
            }
            Some(name) => drop(params.insert(name.to_owned(), decode(rest.pop()?))),
            None => (rest.pop()? == step).then_some(())?,
        }
    }
    rest.is_empty().then_some(params)
}

impl Route {
    /// The check PVE makes on the node that takes the call, before it looks at anything else
    /// (pve-access-control `RPCEnvironment.pm:check_api2_permissions`).
    pub(super) fn permits(&self, access: &Access, user: &str, params: &Params) -> Result<(), PveError> {
        let part = |name: &str| params.get(name).cloned().unwrap_or_default();
        match self.need {
            Need::Anyone => Ok(()),
            Need::Vm(any) => access.check(user, &format!("/vms/{}", part("vmid")), any),
            Need::Storage(any) => access.check(user, &format!("/storage/{}", part("storage")), any),
        }
    }

    /// Checks and normalises the parameters.
    pub(super) fn verify(&self, params: &mut Params) -> Result<(), PveError> {
        let table: Vec<Param> =
            self.params.iter().chain(IN_PATH.iter().filter(|p| self.in_pattern(p.0))).copied().collect();
        verify(&table, self.config_keys, params)
    }

    fn in_pattern(&self, name: &str) -> bool {
        self.pattern.contains(&format!("{{{name}}}")) || self.pattern.contains(&format!("{{{name}*}}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_ids_are_found_encoded_and_unencoded() {
        for path in [
            "/nodes/pve1/storage/local/content/local%3A9999%2Fvm-9999-x.raw",
            "/nodes/pve1/storage/local/content/local:9999/vm-9999-x.raw",
        ] {
            let (route, params) = find("GET", path).expect("the path is a route");
            assert_eq!(route.act, Act::VolumeGet);
            assert_eq!(params["volume"], "local:9999/vm-9999-x.raw");
        }
        assert!(find("GET", "/nope").is_none());
        assert!(find("DELETE", "/version").is_none());
    }
}
