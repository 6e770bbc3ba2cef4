//! The controller's pod at work: the driver and the CSI sidecars of the chart as processes, with the chart's arguments and the chart's rights,
//! over a real API server and the simulator. Kubelet, scheduler and controller manager are played.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    helm::{Rendering, arguments, container, object, objects, program},
    kubernetes::Process,
    rig::{CONTROLLER, NAMESPACE, Rig, until_within},
    rights::{Right, rights},
    support::REGION,
};

const DRIVER: &str = "csi.proxmox.sinextra.dev";
const SIDECARS: [&str; 3] = ["provisioner", "attacher", "resizer"];
/// How long a sidecar may take for one thing, its retries and a machine with other work included.
const LONG: Duration = Duration::from_mins(4);

pub(crate) struct Pod {
    _processes: Vec<Process>,
}

pub(crate) struct Life {
    pub(crate) rig: Rig,
    objects: Vec<Value>,
}

impl Life {
    pub(crate) async fn start() -> Self {
        let values = Rendering {
            namespace: NAMESPACE,
            set: &[
                "defaultStorage=shared",
                "config.clusters[0].region=r1",
                "volumeAttributesClass[0].name=gold",
                "volumeAttributesClass[0].parameters.diskIOPS=500",
            ],
            ..Rendering::default()
        };
        let text = values.text();
        let file = tempfile::Builder::new().suffix(".yaml").tempfile().expect("a file");
        std::fs::write(file.path(), &text).expect("written");
        let rig = Rig::start(file.path().to_str().expect("a name of text")).await;
        Self { rig, objects: objects(&text) }
    }

    async fn create(&self, name: &str, object: &Value) -> Value {
        let file = self.rig.cluster.directory().join(format!("{name}.json"));
        std::fs::write(&file, object.to_string()).expect("written");
        self.rig.cluster.kubectl_json(&["create", "--filename", &file.display().to_string()]).await
    }

    async fn patch(&self, arguments: &[&str], patch: &Value) {
        let patch = format!("--patch={patch}");
        let all = [&["patch"], arguments, &["--type=merge", &patch]].concat();
        self.rig.cluster.kubectl(&all).await;
    }

    async fn get(&self, arguments: &[&str]) -> Option<Value> {
        let all = [&["get", "--ignore-not-found", "--output=json"], arguments].concat();
        let shown = self.rig.cluster.kubectl(&all).await;
        (!shown.trim().is_empty()).then(|| serde_json::from_str(&shown).expect("JSON"))
    }

    /// A node that the kubelet has registered, and the node plugin after it.
    pub(crate) async fn node(&self, name: &str, vmid: u32) {
        self.rig.kubelet(name, vmid).await;
        let place = json!({"metadata": {"labels": {"topology.kubernetes.io/region": REGION, "topology.kubernetes.io/zone": "pve1"}}});
        self.patch(&["node", name], &place).await;
        let keys = ["topology.kubernetes.io/region", "topology.kubernetes.io/zone"];
        let node = self.rig.node(name).await.expect("a Node");
        let owner = json!({"apiVersion": "v1", "kind": "Node", "name": name, "uid": node.metadata.uid});
        let plugin = json!({"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": name, "ownerReferences": [owner]},
            "spec": {"drivers": [{"name": DRIVER, "nodeID": name, "topologyKeys": keys, "allocatable": {"count": 24}}]}});
        self.create(&format!("csinode-{name}"), &plugin).await;
    }

    /// What the controller manager makes of the Deployment, for the owner of what csi-provisioner publishes.
    async fn pod_objects(&self, name: &str) {
        let deployment =
            self.get(&["deployment", CONTROLLER, "--namespace", NAMESPACE]).await.expect("applied");
        let owned = |kind: &str, version: &str, owner: &Value| {
            json!([{"apiVersion": version, "kind": kind, "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"],
                "controller": true, "blockOwnerDeletion": true}])
        };
        let labels = &deployment["spec"]["template"]["metadata"]["labels"];
        let set = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet",
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels, "ownerReferences": owned("Deployment", "apps/v1", &deployment)},
            "spec": {"selector": {"matchLabels": labels}, "template": deployment["spec"]["template"]}});
        let set = self.create(&format!("set-{name}"), &set).await;
        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels, "ownerReferences": owned("ReplicaSet", "apps/v1", &set)},
            "spec": deployment["spec"]["template"]["spec"]});
        self.create(&format!("pod-{name}"), &pod).await;
    }

    /// Starts the containers of a pod of the controller: what the chart says, but for places that are a pod's own.
    async fn pod(&self, name: &str) -> Pod {
        self.pod_with_metrics(name, "127.0.0.1:0").await
    }

    /// The same, with the driver's admin port at this address.
    pub(crate) async fn pod_with_metrics(&self, name: &str, metrics: &str) -> Pod {
        self.pod_objects(name).await;
        let directory = self.rig.cluster.directory();
        let kubeconfig = self.rig.cluster.service_account(NAMESPACE, CONTROLLER).await;
        let deployment = object(&self.objects, "Deployment", CONTROLLER);
        let driver = Path::new(env!("CARGO_BIN_EXE_proxmox-csi")).to_owned();
        let mut processes = Vec::new();
        for (container_name, binary) in [("controller", driver)]
            .into_iter()
            .chain(SIDECARS.map(|name| (name, program(&format!("csi-{name}")))))
        {
            let full = if container_name == "controller" {
                "controller".to_owned()
            } else {
                format!("csi-{container_name}")
            };
            let mut words = vec![
                format!("NAMESPACE={NAMESPACE}"),
                format!("POD_NAME={name}"),
                binary.display().to_string(),
            ];
            for argument in arguments(container(deployment, &full)) {
                let socket = format!("--csi-address=unix://{}", self.rig.socket(name));
                let file = format!("--cloud-config={}", directory.join("config.yaml").display());
                words.push(match argument.split('=').next().expect("a flag") {
                    "--csi-address" => socket,
                    "--cloud-config" => file,
                    "--metrics-address" => format!("--metrics-address={metrics}"),
                    // In a pod it is that of the pod.
                    "--leader-election" => {
                        format!("--leader-election=true\0--leader-election-namespace={NAMESPACE}")
                    }
                    _ => argument,
                });
            }
            let words: Vec<String> =
                words.iter().flat_map(|word| word.split('\0')).map(str::to_owned).collect();
            let all = words.into_iter().chain([format!("--kubeconfig={}", kubeconfig.display())]);
            let process = Process::start(
                &format!("{name}-{container_name}"),
                Path::new("/usr/bin/env"),
                all,
                directory,
            );
            processes.push(process.expect("it starts"));
        }
        Pod { _processes: processes }
    }

    /// What was asked for under the controller's account, by the program that asked, with the name of the object.
    fn used(&self) -> BTreeMap<String, BTreeSet<Right>> {
        let account = format!("system:serviceaccount:{NAMESPACE}:{CONTROLLER}");
        let log =
            std::fs::read_to_string(self.rig.cluster.directory().join("audit.log")).expect("an audit log");
        let mut used: BTreeMap<String, BTreeSet<Right>> = BTreeMap::new();
        for event in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let object = &event["objectRef"];
            if event["user"]["username"] != account.as_str() || object["resource"].is_null() {
                continue;
            }
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let agent = text(&event["userAgent"]);
            let program = agent.split('/').next().unwrap_or_default().trim_start_matches("csi-").to_owned();
            let resource = match object["subresource"].as_str() {
                Some(part) => format!("{}/{part}", text(&object["resource"])),
                None => text(&object["resource"]),
            };
            let code = event["responseStatus"]["code"].as_u64().unwrap_or_default();
            assert!(!matches!(code, 401 | 403), "refused: {event}");
            let name = object["name"].as_str().map(str::to_owned);
            used.entry(program).or_default().insert((
                text(&object["apiGroup"]),
                resource,
                text(&event["verb"]),
                name,
            ));
        }
        used
    }

    /// Has a volume made for a claim, attached to the node `w101` and detached again.
    pub(crate) async fn attached(&self, claim: &Value) {
        let name = claim["metadata"]["name"].as_str().expect("a name");
        self.create(name, claim).await;
        let volume = async || {
            let volumes = self.get(&["persistentvolumes"]).await?;
            let all = volumes["items"].as_array()?.clone();
            all.into_iter().find(|volume| volume["spec"]["claimRef"]["name"] == name)
        };
        until_within(LONG, "a volume is made", async || volume().await.is_some()).await;
        let volume = volume().await.expect("a PV");
        let attachment = json!({"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment", "metadata": {"name": name},
            "spec": {"attacher": DRIVER, "nodeName": "w101", "source": {"persistentVolumeName": volume["metadata"]["name"]}}});
        self.create(&format!("attach-{name}"), &attachment).await;
        let there = async || self.get(&["volumeattachment", name]).await;
        until_within(LONG, "it is attached", async || {
            there().await.is_some_and(|va| va["status"]["attached"] == true)
        })
        .await;
        self.rig.cluster.kubectl(&["delete", "volumeattachment", name, "--wait=false"]).await;
        until_within(LONG, "it is detached", async || there().await.is_none()).await;
    }

    fn drives(&self, vmid: u32) -> usize {
        self.rig.sim.vm(vmid).expect("a vm").open_volumes().count()
    }
}

pub(crate) fn claim(name: &str, class: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": "default",
            // The controller manager's word that this driver is to make the volume.
            "annotations": {"volume.kubernetes.io/storage-provisioner": DRIVER}},
        "spec": {"storageClassName": class, "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}})
}

/// A claim gets a volume, a pod's node gets it attached, it grows, changes its class, is detached and deleted: each step is done by a real
/// sidecar, with what the chart grants.
#[tokio::test(flavor = "multi_thread")]
async fn the_sidecars_of_the_chart_carry_a_volume_through_its_life_with_the_rights_of_the_chart() {
    let life = Life::start().await;
    life.node("w101", 101).await;
    let idle = life.drives(101);
    let _first = life.pod("csi-a").await;
    let leads =
        async |pod: &str| life.rig.holder(CONTROLLER).await.is_some_and(|holder| holder.starts_with(pod));
    until_within(LONG, "the controller has the Lease", async || leads("csi-a").await).await;

    // P1: a second pod's sidecars wait in Probe, and stand for no election.
    let _second = life.pod("csi-b").await;

    life.create("claim", &claim("data", "proxmox-data-immediate")).await;
    let volume = async || {
        let volumes = life.get(&["persistentvolumes"]).await?;
        volumes["items"]
            .as_array()?
            .iter()
            .find(|volume| volume["spec"]["claimRef"]["name"] == "data")
            .cloned()
    };
    until_within(LONG, "csi-provisioner makes the volume", async || volume().await.is_some()).await;
    let made = volume().await.expect("a PV");
    let name = made["metadata"]["name"].as_str().expect("a name").to_owned();
    assert_eq!(made["spec"]["claimRef"]["name"], "data");
    assert_eq!(made["spec"]["csi"]["fsType"], "ext4");
    let handle = made["spec"]["csi"]["volumeHandle"].as_str().expect("a handle").to_owned();
    assert!(handle.starts_with(&format!("{REGION}//shared/")), "{handle}");

    // The controller manager binds the two.
    life.patch(&["pv", &name, "--subresource=status"], &json!({"status": {"phase": "Bound"}})).await;
    life.patch(&["pvc", "data"], &json!({"spec": {"volumeName": name}, "metadata": {"annotations": {"pv.kubernetes.io/bind-completed": "yes"}}})).await;
    let bound = json!({"status": {"phase": "Bound", "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"]}});
    life.patch(&["pvc", "data", "--subresource=status"], &bound).await;

    // A pod is scheduled to the node, and the attach-detach controller asks for the volume there.
    let attachment = json!({"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment", "metadata": {"name": "va-1"},
        "spec": {"attacher": DRIVER, "nodeName": "w101", "source": {"persistentVolumeName": name}}});
    life.create("attachment", &attachment).await;
    let attached = async || {
        life.get(&["volumeattachment", "va-1"]).await.is_some_and(|va| va["status"]["attached"] == true)
    };
    until_within(LONG, "csi-attacher attaches it", attached).await;
    assert_eq!(life.drives(101), idle + 1);
    let shown = life.get(&["volumeattachment", "va-1"]).await.expect("it is there");
    assert!(
        shown["status"]["attachmentMetadata"]["DevicePath"].as_str().expect("a path").contains("wwn-0x3c51"),
        "{shown}"
    );

    life.patch(&["pvc", "data"], &json!({"spec": {"resources": {"requests": {"storage": "2Gi"}}}})).await;
    let grown = async || volume().await.is_some_and(|pv| pv["spec"]["capacity"]["storage"] == "2Gi");
    until_within(LONG, "csi-resizer grows it", grown).await;

    life.patch(&["pvc", "data"], &json!({"spec": {"volumeAttributesClassName": "gold"}})).await;
    let changed = async || volume().await.is_some_and(|pv| pv["spec"]["volumeAttributesClassName"] == "gold");
    until_within(LONG, "csi-resizer gives it its class", changed).await;
    let kept = volume().await.expect("the PV");
    assert_eq!(kept["metadata"]["annotations"][format!("{DRIVER}/attributes")], r#"{"diskIOPS":"500"}"#);

    life.rig.cluster.kubectl(&["delete", "volumeattachment", "va-1", "--wait=false"]).await;
    until_within(LONG, "csi-attacher detaches it", async || {
        life.get(&["volumeattachment", "va-1"]).await.is_none()
    })
    .await;
    assert_eq!(life.drives(101), idle);

    // A claim that can not be had where the scheduler wants it is told about, and given back to the scheduler.
    let class = json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "impossible"},
        "provisioner": DRIVER, "volumeBindingMode": "WaitForFirstConsumer", "parameters": {"storage": "local"}});
    life.create("class", &class).await;
    let mut impossible = claim("impossible", "impossible");
    impossible["metadata"]["annotations"]["volume.kubernetes.io/selected-node"] = json!("w101");
    impossible["spec"]["resources"]["requests"]["storage"] = json!("900Ti");
    life.create("impossible", &impossible).await;
    let told = async || {
        life.rig
            .cluster
            .kubectl(&["get", "events", "--field-selector=reason=ProvisioningFailed"])
            .await
            .contains("`local`")
    };
    until_within(LONG, "csi-provisioner tells why not", told).await;
    let given_back = async || {
        let claim = life.get(&["pvc", "impossible"]).await.expect("a claim");
        claim["metadata"]["annotations"]["volume.kubernetes.io/selected-node"].is_null()
    };
    until_within(LONG, "csi-provisioner asks for another node", given_back).await;
    life.rig.cluster.kubectl(&["delete", "pvc", "impossible", "--wait=false"]).await;

    // A claim that has a class from the start.
    let mut classed = claim("classed", "proxmox-data-immediate");
    classed["spec"]["volumeAttributesClassName"] = json!("gold");
    life.create("classed", &classed).await;
    let both = async || {
        life.get(&["pv"]).await.is_some_and(|list| list["items"].as_array().is_some_and(|all| all.len() == 2))
    };
    until_within(LONG, "csi-provisioner makes a volume with a class", both).await;

    let drop_finalizers = json!({"metadata": {"finalizers": null}});
    life.patch(&["pvc", "data"], &drop_finalizers).await;
    life.rig.cluster.kubectl(&["delete", "pvc", "data", "--wait=false"]).await;
    life.patch(&["pv", &name, "--subresource=status"], &json!({"status": {"phase": "Released"}})).await;
    let deleted = async || match volume().await {
        None => true,
        // The controller manager lets go of it once it is deleted.
        Some(pv) if !pv["metadata"]["deletionTimestamp"].is_null() => {
            let protection = "kubernetes.io/pv-protection";
            let left = pv["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
            if left.iter().any(|one| one == protection) {
                let left: Vec<_> = left.into_iter().filter(|one| one != protection).collect();
                life.patch(&["pv", &name], &json!({"metadata": {"finalizers": left}})).await;
            }
            false
        }
        Some(_) => false,
    };
    until_within(LONG, "csi-provisioner deletes it", deleted).await;

    // The free space of the storages, owned by the Deployment.
    let published = async || {
        life.get(&["csistoragecapacities", "--namespace", NAMESPACE]).await.is_some_and(|list| {
            list["items"].as_array().is_some_and(|items| {
                items.iter().any(|item| {
                    item["storageClassName"] == "proxmox-data-xfs" && item["capacity"].is_string()
                })
            })
        })
    };
    until_within(LONG, "csi-provisioner publishes the free space", published).await;
    let capacities = life.get(&["csistoragecapacities", "--namespace", NAMESPACE]).await.expect("a list");
    assert_eq!(capacities["items"][0]["metadata"]["ownerReferences"][0]["name"], CONTROLLER);
    life.rig.cluster.kubectl(&["delete", "storageclass", "proxmox-data-xfs"]).await;
    let withdrawn = async || {
        life.get(&["csistoragecapacities", "--namespace", NAMESPACE]).await.is_some_and(|list| {
            list["items"]
                .as_array()
                .is_some_and(|items| items.iter().all(|item| item["storageClassName"] != "proxmox-data-xfs"))
        })
    };
    until_within(LONG, "and takes it back with its class", withdrawn).await;

    // All leases are those of the first pod's processes, and the second pod's have asked for none.
    for lease in [
        "csi-proxmox-sinextra-dev",
        "external-attacher-leader-csi-proxmox-sinextra-dev",
        "external-resizer-csi-proxmox-sinextra-dev",
    ] {
        let holder = life.rig.holder(lease).await.expect("a Lease");
        assert!(!holder.is_empty(), "{lease}");
    }
    for sidecar in SIDECARS {
        let log = std::fs::read_to_string(life.rig.cluster.directory().join(format!("csi-b-{sidecar}.log")))
            .expect("a log");
        assert!(
            !log.contains("attempting to acquire leader lease"),
            "csi-b's csi-{sidecar} stands for election:\n{log}"
        );
    }

    used_is_granted(&life);
}

/// Rights that no run of a few minutes uses, each with the reason why it is there all the same.
fn is_rare((_, resource, verb, _): &Right) -> bool {
    // An API server that does not stream lists as watches is asked for a list first.
    let listed = verb == "list";
    // The same Event again counts up the one that is there.
    let repeated = resource == "events" && verb == "patch";
    // Free space that has changed is seen by a look that is taken once a minute.
    let changed = resource == "csistoragecapacities" && verb == "update";
    listed || repeated || changed
}

#[track_caller]
fn used_is_granted(life: &Life) {
    let used = life.used();
    println!("programs that asked: {:?}", used.keys().collect::<Vec<_>>());
    let mut odd = Vec::new();
    for sidecar in SIDECARS {
        let mut granted = rights([object(&life.objects, "ClusterRole", &format!("proxmox-csi-{sidecar}"))]);
        let shared = rights([object(&life.objects, "Role", "proxmox-csi-sidecars")]);
        let lease = match sidecar {
            "provisioner" => "csi-proxmox-sinextra-dev",
            "attacher" => "external-attacher-leader-csi-proxmox-sinextra-dev",
            _ => "external-resizer-csi-proxmox-sinextra-dev",
        };
        granted.extend(shared.into_iter().filter(|(_, resource, _, name)| match resource.as_str() {
            "leases" => name.as_deref().is_none_or(|name| name == lease),
            "events" => true,
            _ => sidecar == "provisioner",
        }));
        let used = used.get(sidecar).unwrap_or_else(|| panic!("csi-{sidecar} asked for nothing"));
        let covers = |right: &Right, done: &Right| {
            (&right.0, &right.1, &right.2) == (&done.0, &done.1, &done.2)
                && (right.3.is_none() || right.3 == done.3)
        };
        for done in used {
            if !granted.iter().any(|right| covers(right, done)) {
                odd.push(format!("csi-{sidecar} uses what its role does not have: {done:?}"));
            }
        }
        for right in &granted {
            if !is_rare(right) && !used.iter().any(|done| covers(right, done)) {
                odd.push(format!("csi-{sidecar} does not use {right:?}"));
            }
        }
    }
    assert!(odd.is_empty(), "{}", odd.join("\n"));
}
