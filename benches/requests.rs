//! Requests to Proxmox for each operation, and how long it takes at recorded latencies: `cargo bench --bench requests`.
//!
//! Time is simulated: figures are the same on every machine.

#[path = "../tests/support/mod.rs"]
mod support;

use support::budget::{OPERATIONS, lives};

fn main() {
    for vms in [10, 1000] {
        for storage in ["local", "shared"] {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
            let (cold, steady) = runtime.expect("a runtime").block_on(lives(vms, storage));
            println!("{vms} VMs, storage `{storage}`        first touch                  steady state");
            println!("             requests  shared      ms    requests  shared      ms");
            for operation in OPERATIONS {
                let (cold, steady) = (cold[operation], steady[operation]);
                println!(
                    "  {operation:9} {:9} {:7} {:7} {:11} {:7} {:7}",
                    cold.own, cold.shared, cold.ms, steady.own, steady.shared, steady.ms
                );
            }
            println!();
        }
    }
    println!(
        "shared: requests of sweeps and of the region's poll, which serve all operations that wait for them"
    );
}
