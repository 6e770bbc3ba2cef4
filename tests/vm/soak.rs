//! Volumes that come, go and move at random on three guests at once, with every byte of theirs summed up.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;

use crate::rig::{Pvc, Rig, Setup};

/// How long, unless `VM_SOAK_SECONDS` says otherwise: `make soak-vm` does.
const SECONDS: u64 = 30;
/// What moves.
const KINDS: [&str; 6] = ["xfs", "ext4", "btrfs", "xfs", "ext4", "btrfs"];
/// Where to.
const GUESTS: [u32; 3] = [101, 102, 103];

/// Numbers that look random, the same ones from the same seed (xorshift, Marsaglia 2003).
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(end).expect("it is small")).expect("it is smaller")
    }
}

/// How long each step took, by its name.
#[derive(Clone, Default)]
struct Times(Arc<Mutex<BTreeMap<&'static str, Vec<Duration>>>>);

impl Times {
    async fn of<T>(&self, step: &'static str, work: impl Future<Output = T>) -> T {
        let started = Instant::now();
        let done = work.await;
        self.0.lock().expect("no panic").entry(step).or_default().push(started.elapsed());
        done
    }

    fn report(&self) -> String {
        let mut steps = self.0.lock().expect("no panic").clone();
        let mut lines =
            vec![format!("{:<8} {:>6} {:>9} {:>9} {:>9}", "step", "count", "p50 ms", "p99 ms", "max ms")];
        for (step, times) in &mut steps {
            times.sort();
            let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_millis();
            lines.push(format!("{step:<8} {:>6} {:>9} {:>9} {:>9}", times.len(), at(50), at(99), at(100)));
        }
        lines.join("\n")
    }
}

/// One volume's way until the time is over.
async fn lives(rig: &Rig, mut pvc: Pvc, mut chance: Chance, times: Times, end: Instant) {
    let mut files: BTreeMap<usize, String> = BTreeMap::new();
    while Instant::now() < end {
        let vmid = GUESTS[chance.below(GUESTS.len())];
        times.of("attach", rig.attach(&mut pvc, vmid)).await;
        let guest = rig.guest(vmid);
        for _ in 0..=chance.below(2) {
            times.of("stage", guest.stage(&pvc)).await;
            let sums = times
                .of("verify", guest.sh(&format!("cd {}; sha256sum file-* 2>/dev/null || true", pvc.staging)))
                .await;
            let expected: Vec<String> =
                files.iter().map(|(number, sum)| format!("{sum}  file-{number}")).collect();
            let mut found: Vec<&str> = sums.lines().collect();
            found.sort_by_key(|line| line.rsplit('-').next().and_then(|n| n.parse::<usize>().ok()));
            assert_eq!(found, expected, "{} on VM {vmid}", pvc.volume.volume_id);
            for _ in 0..=chance.below(3) {
                let (number, bytes) = (chance.below(8), 1 + chance.below(4_000_000));
                // Only what was synced has to be there later.
                let script = format!(
                    "cd {}; head -c {bytes} /dev/urandom >file-{number}; sync -f file-{number}; sha256sum file-{number}",
                    pvc.staging
                );
                let said = times.of("write", guest.sh(&script)).await;
                files.insert(number, said.split(' ').next().expect("a sum").to_owned());
            }
            times.of("unstage", guest.unstage(&pvc)).await;
        }
        times.of("detach", rig.detach(&pvc, vmid)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_that_move_at_random_keep_every_byte() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let seed = number("VM_SOAK_SEED").unwrap_or_else(rand_seed);
    let seconds = number("VM_SOAK_SECONDS").unwrap_or(SECONDS);
    println!("VM_SOAK_SEED={seed} VM_SOAK_SECONDS={seconds}");
    let rig = Arc::new(Setup::of(&GUESTS).boot().await);
    let (times, end) = (Times::default(), Instant::now() + Duration::from_secs(seconds));
    let mut ways = Vec::new();
    for (index, kind) in (0_u64..).zip(KINDS) {
        let name = format!("pvc-{index}-{kind}");
        let pvc = rig.volume(&name, "shared").await.formatted_as(kind);
        let pvc = pvc.staged_at(&format!("/var/lib/kubelet/{name}/globalmount"));
        let chance = Chance((seed ^ (index << 32)) | 1);
        let (rig, times) = (Arc::clone(&rig), times.clone());
        ways.push(tokio::spawn(async move { lives(&rig, pvc, chance, times, end).await }));
    }
    for way in ways {
        way.await.expect("every byte is as it was written");
    }
    println!("{}", times.report());
    for vmid in GUESTS {
        assert_eq!(rig.guest(vmid).disks().await, "", "VM {vmid} has given all back");
        assert_eq!(rig.sim().vm(vmid).expect("a VM").guest_disks().len(), 1);
    }
    rig.sim().shutdown().await;
}

/// Another one each time.
fn rand_seed() -> u64 {
    u64::from(uuid::Uuid::new_v4().as_fields().0)
}
