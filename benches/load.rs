//! Hundreds of volumes at once: `cargo bench --bench load`. Time is simulated, with the latencies, locks and workers that were recorded, so
//! that the figures are the same on every machine; memory is that of this process, the simulator and its disks included.

#[path = "../tests/support/mod.rs"]
mod support;

use support::load::load;

/// A line of `/proc/self/status`, such as `VmHWM`.
fn memory(key: &str) -> String {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.expect("the kernel tells").trim().to_owned()
}

fn main() {
    for (volumes, vms) in [(100, 20), (500, 20)] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let report = runtime.expect("a runtime").block_on(load(volumes, vms));
        println!("{volumes} volumes at once on {vms} VMs");
        println!("  took                    {:6.1} s", report.took.as_secs_f64());
        println!("  one VM's lock allows    {:6.1} s", report.bound.as_secs_f64());
        for (operation, longest) in &report.longest {
            println!("  longest {operation:15} {:6.1} s", longest.as_secs_f64());
        }
        let (region, node) = report.most;
        println!("  requests under way      {region} in the region, {node} at a node, at most");
        let (longest, what) = report.person;
        println!(
            "  a person's longest wait {:6} ms, for {what}, of {} looks",
            longest.as_millis(),
            report.asked
        );
        println!("  calls past a deadline   {:?}", report.timeouts);
        println!("  errors                  {:?}", report.errors);
        println!("  memory                  {} at most\n", memory("VmHWM"));
    }
}
