//! The node over real disks: loop devices, mkfs, mounts and data of this machine's kernel.
//!
//! The scenarios are those of `node_memory`; what only one of the two can show stands in its own file. Needs root and a mount namespace
//! of its own; run it with `unshare --mount --propagation private cargo test --test real_node`.

#[path = "real_node/failing.rs"]
mod failing;
#[path = "real_node/guard.rs"]
mod guard;
mod node_suite;
#[path = "real_node/own.rs"]
mod own;
#[path = "real_node/rig.rs"]
mod rig;

use node_suite::every_scenario;

macro_rules! over_loop_devices {
    ($($file:ident :: $name:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                crate::node_suite::$file::$name::<crate::rig::Loops>().await;
            }
        )*
    };
}

every_scenario!(over_loop_devices);
