//! The node over a machine in memory: the scenarios of `real_node`, without root and on a paused clock; what a guest of the simulator
//! sees of what happens to its volumes; and what needs a kernel that does as it is told.

mod node_suite;
#[path = "node_memory/own.rs"]
mod own;
#[path = "node_memory/rig.rs"]
mod rig;
#[path = "node_memory/simulator.rs"]
mod simulator;
mod support;

use node_suite::every_scenario;

macro_rules! in_memory {
    ($($file:ident :: $name:ident,)*) => {
        $(
            #[tokio::test(start_paused = true)]
            async fn $name() {
                crate::node_suite::$file::$name::<crate::rig::Memory>().await;
            }
        )*
    };
}

every_scenario!(in_memory);

mod shared_root {
    macro_rules! below_a_shared_root {
        ($($file:ident :: $name:ident,)*) => {
            $(
                #[tokio::test(start_paused = true)]
                async fn $name() {
                    crate::node_suite::$file::$name::<crate::rig::SharedRoot>().await;
                }
            )*
        };
    }

    crate::node_suite::every_scenario!(below_a_shared_root);
}
