//! Which calls of PVE's API the simulator models. What a call takes and who may make it is in `rules::api`.

/// Everything a call can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Version,
    Resources,
    NextId,
    ClusterStatus,
    Nodes,
    Permissions,
    Ticket,
    StorageConfigs,
    StorageConfig,
    StorageCreate,
    StorageUpdate,
    StorageDelete,
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

const STORAGE: &str = "/nodes/{node}/storage/{storage}";
const VM: &str = "/nodes/{node}/qemu/{vmid}";

/// Method, base and rest of the pattern, act.
const ACTS: &[(&str, &str, &str, Act)] = &[
    ("GET", "", "/version", Act::Version),
    ("GET", "", "/cluster/resources", Act::Resources),
    ("GET", "", "/cluster/nextid", Act::NextId),
    ("GET", "", "/cluster/status", Act::ClusterStatus),
    ("GET", "", "/nodes", Act::Nodes),
    ("GET", "", "/access/permissions", Act::Permissions),
    ("POST", "", "/access/ticket", Act::Ticket),
    ("GET", "", "/storage", Act::StorageConfigs),
    ("POST", "", "/storage", Act::StorageCreate),
    ("GET", "", "/storage/{storage}", Act::StorageConfig),
    ("PUT", "", "/storage/{storage}", Act::StorageUpdate),
    ("DELETE", "", "/storage/{storage}", Act::StorageDelete),
    ("GET", "", "/nodes/{node}/storage", Act::StorageList),
    ("GET", STORAGE, "/status", Act::StorageStatus),
    ("GET", STORAGE, "/content", Act::ContentList),
    ("POST", STORAGE, "/content", Act::Alloc),
    ("GET", STORAGE, "/content/{volume}", Act::VolumeGet),
    ("DELETE", STORAGE, "/content/{volume}", Act::VolumeDelete),
    ("GET", "", "/nodes/{node}/qemu", Act::VmList),
    ("POST", "", "/nodes/{node}/qemu", Act::VmCreate),
    ("DELETE", VM, "", Act::VmDestroy),
    ("GET", VM, "/config", Act::ConfigGet),
    ("PUT", VM, "/config", Act::ConfigPut),
    ("POST", VM, "/config", Act::ConfigPost),
    ("GET", VM, "/pending", Act::Pending),
    ("PUT", VM, "/unlink", Act::Unlink),
    ("PUT", VM, "/resize", Act::Resize),
    ("GET", VM, "/status/current", Act::StatusCurrent),
    ("POST", VM, "/status/start", Act::Start),
    ("POST", VM, "/status/stop", Act::Stop),
    ("GET", VM, "/snapshot", Act::SnapshotList),
    ("POST", VM, "/snapshot", Act::SnapshotCreate),
    ("DELETE", VM, "/snapshot/{snapname}", Act::SnapshotDelete),
    ("GET", VM, "/snapshot/{snapname}/config", Act::SnapshotConfig),
    ("GET", "", "/nodes/{node}/tasks", Act::TaskList),
    ("GET", "", "/nodes/{node}/tasks/{upid}/status", Act::TaskStatus),
    ("GET", "", "/nodes/{node}/tasks/{upid}/log", Act::TaskLog),
];

/// What the call of this method and pattern does, `None` where the simulator does not know it.
pub(super) fn act(method: &str, pattern: &str) -> Option<Act> {
    ACTS.iter()
        .find(|(verb, base, rest, _)| {
            *verb == method && pattern.strip_prefix(base).is_some_and(|tail| tail == *rest)
        })
        .map(|(.., act)| *act)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::rules::api;

    #[test]
    fn every_modelled_call_is_one_of_pve() {
        for (method, base, rest, _) in ACTS {
            let path = format!("{base}{rest}").replace(['{', '}'], "");
            let found = api::find(method, &path);
            assert!(found.is_some(), "{method} {base}{rest} is not in the schema");
        }
    }
}
