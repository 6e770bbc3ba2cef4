//! Calls to a controller as the sidecars make them, and whether what is answered is true.

use std::{collections::BTreeMap, time::Duration};

use proxmox_csi::csi::proto::{
    self, controller_server::Controller as _, volume_capability::access_mode::Mode,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Status};

use crate::{
    holds::Where,
    ledger::{Created, Ledger, Life},
    plan::{Call, Kind},
    process::Target,
    rig::Rig,
    support::{GIB, REGION, at, mount, places, strings, with_mode},
};

/// What was answered with OK, as far as it can be compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Volume { id: String, bytes: i64 },
    Context(BTreeMap<String, String>),
    Grown(i64),
    Listed(Vec<String>),
    Done,
}

/// Whether external-provisioner takes a code as "may still be running".
pub fn is_unknown(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::Aborted | Code::DeadlineExceeded | Code::Cancelled)
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(240).collect()
}

/// P5: a publication that nothing came between is answered as it was before, but for the size.
fn a_repeated_call_answers_the_same(
    ledger: &mut Ledger,
    since: Instant,
    volume: usize,
    key: (u32, bool),
    context: &BTreeMap<String, String>,
) {
    let Some((at, before)) = ledger.lives[volume].contexts.get(&key).cloned() else { return };
    if before != *context && !ledger.is_touched(at.min(since), Some(key.0), volume) {
        let text = format!("pvc-{volume} on VM {}: {before:?}, and then {context:?}", key.0);
        ledger.wrong("a_repeated_call_answers_the_same", text);
    }
}

/// What a call means for what its callers know, before anything is answered.
fn note_begin(life: &mut Life, call: &Call, vm: u32) {
    match call.kind {
        Kind::Create if life.created == Created::No => life.created = Created::Unknown,
        Kind::Delete => life.deletion = true,
        Kind::Publish | Kind::PublishReadOnly => drop(life.published.insert(vm)),
        Kind::Unpublish | Kind::UnpublishAll => life.contexts.clear(),
        _ => {}
    }
}

impl Rig {
    /// Calls until it succeeds, is refused for good, or was tried often enough. The last answer; `None` where there was none.
    pub async fn call(&self, call: &Call) -> Option<Result<Answer, Status>> {
        let vm = self.setup.vms[call.vm].vmid;
        let mut last = None;
        for attempt in 0..call.tries {
            let target = self.target(call.other);
            let number = {
                let mut ledger = self.ledger();
                note_begin(&mut ledger.lives[call.volume], call, vm);
                ledger.ask(target.number, call.kind, call.volume, vm)
            };
            let work = timeout(Duration::from_secs(call.deadline), self.perform(&target, call, vm));
            let answer = tokio::select! {
                biased;
                () = target.dead.cancelled() => None,
                answer = work => answer.ok(),
            };
            let what = format!("  c{} {:?} pvc-{} worker-{vm}", target.number, call.kind, call.volume);
            last.clone_from(&answer);
            match answer {
                None => {
                    let mut ledger = self.ledger();
                    ledger.given_up(number);
                    ledger.say(&format!("{what} -> the caller gave up or the process ended"));
                }
                Some(answer) => {
                    self.an_ok_is_true_when_it_is_said(number, call, vm, &answer);
                    let mut ledger = self.ledger();
                    ledger.answered(number);
                    match answer {
                        Ok(answer) => {
                            ledger.say(&format!("{what} -> OK {answer:?}"));
                            *ledger.answers.entry(format!("{:?} Ok", call.kind)).or_default() += 1;
                            return last;
                        }
                        Err(status) => {
                            let (code, text) = (status.code(), first_line(status.message()));
                            ledger.say(&format!("{what} -> {code:?}: {text}"));
                            *ledger.answers.entry(format!("{:?} {code:?}", call.kind)).or_default() += 1;
                            // The provisioner asks again later only while the outcome is not known.
                            if call.kind == Kind::Create && !is_unknown(code) {
                                return last;
                            }
                        }
                    }
                }
            }
            if attempt + 1 < call.tries {
                sleep(Duration::from_secs(1 << attempt.min(6))).await;
            }
        }
        last
    }

    async fn perform(&self, target: &Target, call: &Call, vm: u32) -> Result<Answer, Status> {
        let (service, spec) = (&target.service, &self.setup.volumes[call.volume]);
        let mode = if spec.many { Mode::MultiNodeReaderOnly } else { Mode::SingleNodeWriter };
        let capability = with_mode(mount(), mode);
        let (volume_id, node_id) = (spec.handle.clone(), format!("worker-{vm}"));
        match call.kind {
            Kind::Create => {
                let zone = spec.key.node.as_deref().unwrap_or_default();
                let request = proto::CreateVolumeRequest {
                    name: spec.name.clone(),
                    capacity_range: Some(proto::CapacityRange { required_bytes: GIB, limit_bytes: 0 }),
                    volume_capabilities: vec![capability],
                    parameters: strings(&[("storage", &spec.key.storage)]),
                    accessibility_requirements: Some(places(&[at(REGION, zone)])),
                    ..Default::default()
                };
                let response = service.create_volume(Request::new(request)).await?.into_inner();
                let volume = response.volume.expect("an OK has a volume");
                Ok(Answer::Volume { id: volume.volume_id, bytes: volume.capacity_bytes })
            }
            Kind::Delete => {
                let request = proto::DeleteVolumeRequest { volume_id, ..Default::default() };
                service.delete_volume(Request::new(request)).await.map(|_| Answer::Done)
            }
            Kind::Publish | Kind::PublishReadOnly => {
                let request = proto::ControllerPublishVolumeRequest {
                    volume_id,
                    node_id,
                    volume_capability: Some(capability),
                    readonly: call.kind == Kind::PublishReadOnly,
                    ..Default::default()
                };
                let response = service.controller_publish_volume(Request::new(request)).await?.into_inner();
                Ok(Answer::Context(response.publish_context))
            }
            Kind::Unpublish | Kind::UnpublishAll => {
                let node_id = if call.kind == Kind::Unpublish { node_id } else { String::new() };
                let request =
                    proto::ControllerUnpublishVolumeRequest { volume_id, node_id, ..Default::default() };
                service.controller_unpublish_volume(Request::new(request)).await.map(|_| Answer::Done)
            }
            Kind::Expand(gib) => {
                let required_bytes = i64::from(gib) * GIB;
                let request = proto::ControllerExpandVolumeRequest {
                    volume_id,
                    capacity_range: Some(proto::CapacityRange { required_bytes, limit_bytes: 0 }),
                    volume_capability: Some(capability),
                    ..Default::default()
                };
                let response = service.controller_expand_volume(Request::new(request)).await?.into_inner();
                Ok(Answer::Grown(response.capacity_bytes))
            }
            Kind::Modify(iops) => {
                let request = proto::ControllerModifyVolumeRequest {
                    volume_id,
                    mutable_parameters: strings(&[("diskIOPS", &iops.to_string())]),
                    ..Default::default()
                };
                service.controller_modify_volume(Request::new(request)).await.map(|_| Answer::Done)
            }
            Kind::Validate => {
                let request = proto::ValidateVolumeCapabilitiesRequest {
                    volume_id,
                    volume_capabilities: vec![capability],
                    ..Default::default()
                };
                service.validate_volume_capabilities(Request::new(request)).await.map(|_| Answer::Done)
            }
            Kind::List => {
                let request = proto::ListVolumesRequest::default();
                let response = service.list_volumes(Request::new(request)).await?.into_inner();
                let ids = response.entries.into_iter().map(|entry| entry.volume.expect("a volume").volume_id);
                Ok(Answer::Listed(ids.collect()))
            }
            Kind::Capacity => {
                let request = proto::GetCapacityRequest {
                    parameters: strings(&[("storage", &spec.key.storage)]),
                    accessible_topology: spec.key.node.as_deref().map(|node| at(REGION, node)),
                    ..Default::default()
                };
                let response = service.get_capacity(Request::new(request)).await?.into_inner();
                Ok(Answer::Grown(response.available_capacity))
            }
        }
    }

    /// P2: an answer with OK is true at the moment it is heard. What is heard is noted.
    fn an_ok_is_true_when_it_is_said(
        &self,
        number: usize,
        call: &Call,
        vm: u32,
        answer: &Result<Answer, Status>,
    ) {
        let (controller, since) = {
            let ledger = self.ledger();
            let asked = &ledger.asked[number];
            let begun = ledger.at_work_since(asked.controller, call.kind, call.volume, vm);
            (asked.controller, begun.unwrap_or(asked.begun))
        };
        if let Ok(answer) = answer
            && let Err(text) = self.is_true(call, vm, answer)
        {
            let mut ledger = self.ledger();
            // Other calls on the volume, of which one has not heard, may have changed it since.
            let others = ledger.asked.iter().any(|asked| {
                asked.volume == call.volume
                    && (asked.kind, asked.vm) != (call.kind, vm)
                    && asked.ended.is_none_or(|ended| ended >= since)
                    && (call.kind == Kind::Create || asked.kind == Kind::Create)
            });
            if !others && !ledger.is_touched(since, Some(vm), call.volume) {
                let text = format!("c{controller} {:?} of pvc-{}: {text}", call.kind, call.volume);
                ledger.wrong("an_ok_is_true_when_it_is_said", text);
            }
        }
        self.note_answer(since, call, vm, answer);
    }

    fn note_answer(&self, since: Instant, call: &Call, vm: u32, answer: &Result<Answer, Status>) {
        let volume = call.volume;
        let mut ledger = self.ledger();
        match (call.kind, answer) {
            (Kind::Create, Ok(_)) => {
                ledger.lives[volume].created = Created::Yes;
                ledger.lives[volume].deletion = false;
            }
            // One that is there already, and was refused because it is another size by now, stays.
            (Kind::Create, Err(status))
                if !is_unknown(status.code())
                    && status.code() != Code::AlreadyExists
                    && ledger.lives[volume].created == Created::Unknown =>
            {
                ledger.lives[volume].created = Created::No;
            }
            (Kind::Delete, Ok(_)) => {
                let life = &mut ledger.lives[volume];
                if life.created == Created::Yes {
                    life.created = Created::No;
                }
                life.contexts.clear();
            }
            (Kind::Unpublish, Ok(_)) => drop(ledger.lives[volume].published.remove(&vm)),
            (Kind::UnpublishAll, Ok(_)) => ledger.lives[volume].published.clear(),
            (Kind::Publish | Kind::PublishReadOnly, Ok(Answer::Context(context))) => {
                let mut context = context.clone();
                context.remove("csi.proxmox.sinextra.dev/size-bytes");
                let key = (vm, call.kind == Kind::PublishReadOnly);
                a_repeated_call_answers_the_same(&mut ledger, since, volume, key, &context);
                ledger.lives[volume].contexts.insert(key, (Instant::now(), context));
            }
            _ => {}
        }
    }

    /// Whether it is so.
    fn is_true(&self, call: &Call, vmid: u32, answer: &Answer) -> Result<(), String> {
        let spec = &self.setup.volumes[call.volume];
        let there = self.sim.volumes().into_iter().find(|volume| volume.key == spec.key);
        let holds: Vec<_> =
            self.holds_of(vmid).into_iter().filter(|hold| hold.volume == call.volume).collect();
        let vm = self.sim.vm(vmid).filter(|_| self.is_its_node(vmid));
        match (call.kind, answer) {
            (Kind::Create, Answer::Volume { id, bytes }) => {
                let size = there.ok_or("it is not there")?.size;
                let fits = i64::try_from(size).is_ok_and(|size| size == *bytes && size >= GIB);
                if !fits || *id != spec.handle {
                    return Err(format!("{id} of {bytes} bytes, and it has {size}"));
                }
            }
            (Kind::Delete, _) if there.is_some() => return Err("it is still there".to_owned()),
            (Kind::Publish | Kind::PublishReadOnly, Answer::Context(context)) => {
                let vm = vm.ok_or("its VM is another one")?;
                let slot = format!("scsi{}", context.get("lun").ok_or("no LUN is told")?);
                let wwn = context.get("DevicePath").and_then(|path| path.rsplit("wwn-").next());
                let is_here =
                    |at: Where| holds.iter().any(|h| h.at == at && h.slot == slot && h.wwn.as_deref() == wwn);
                if !is_here(Where::Current) || (vm.running && !is_here(Where::Qemu)) {
                    return Err(format!("VM {vmid} was to have it in {slot} as {wwn:?}, and has {holds:?}"));
                }
                if vm.is_pending_delete(&slot) {
                    return Err(format!("{slot} of VM {vmid} goes at its next start"));
                }
                let same = vm.guest_disks().into_iter().filter(|disk| disk.wwn.as_deref() == wwn).count();
                if same > 1 {
                    return Err(format!("{same} disks of VM {vmid} answer with {wwn:?}"));
                }
                // Whether the volume itself is still there is not said: Proxmox deletes it under a running VM.
            }
            (Kind::Unpublish, _) if vm.is_some() && !holds.is_empty() => {
                return Err(format!("VM {vmid} still has it: {holds:?}"));
            }
            (Kind::Expand(gib), Answer::Grown(bytes)) => {
                let size = i64::try_from(there.ok_or("it is not there")?.size).unwrap_or(i64::MAX);
                if size < i64::from(gib) * GIB || *bytes < i64::from(gib) * GIB {
                    return Err(format!("it has {size} bytes, and {bytes} were told"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
