//! The `proxmox-csi` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    proxmox_csi::cli::main()
}
