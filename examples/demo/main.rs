//! The demo: the life of a PVC on the embedded Proxmox.
//!
//! Starts the simulator, one controller and the node plugins as processes, talks to their sockets as Kubernetes does, and
//! shows each step. Loop devices, file systems and mounts are this machine's own; run it in a mount namespace of its own
//! (`make demo` does). With `--hold` it only starts everything and waits, for csi-sanity and for looking around.

#![allow(missing_docs, unreachable_pub, reason = "a program, not a library")]

mod guest;
mod life;
mod show;
mod stack;

use std::{fs, path::PathBuf, process::ExitCode};

use clap::Parser;
use show::Show;
use stack::Stack;
use tokio::signal::unix::{SignalKind, signal};

type Fail = Box<dyn std::error::Error + Send + Sync>;

/// Show the life of a PVC on an embedded Proxmox VE: created, plugged into a VM, formatted as XFS, written to, grown, moved to another VM,
/// read back and deleted.
#[derive(Debug, Parser)]
struct Arguments {
    /// What Proxmox's acts cost: the times recorded on a real cluster, or nothing
    #[arg(long, default_value = "recorded", value_parser = ["recorded", "none"])]
    time: String,

    /// World file of the simulator, in place of the built-in one
    #[arg(long, value_name = "FILE")]
    world: Option<PathBuf>,

    /// Make the VMs real: QEMU processes that boot the image in this directory, as `tests/guest-image/build.sh` makes it. Needs neither root
    /// nor loop devices
    #[arg(long, value_name = "DIRECTORY", conflicts_with_all = ["world", "hold"])]
    image: Option<PathBuf>,

    /// End with an error after this step, to see that a failure leaves nothing behind
    #[arg(long, value_name = "STEP")]
    fail_after: Option<u32>,

    /// Wait for Ctrl-C after this step, to look around
    #[arg(long, value_name = "STEP")]
    pause_after: Option<u32>,

    /// Start everything, write where it is to this file, and wait for Ctrl-C
    #[arg(long, value_name = "FILE")]
    hold: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let directory = match tempfile::Builder::new().prefix("proxmox-csi-demo-").tempdir() {
        Ok(directory) => directory,
        Err(error) => return report(&error.into()),
    };
    let mut stack = None;
    let mut show = Show::new();
    let done = tokio::select! {
        biased;
        interrupted = interrupt() => interrupted.and_then(|()| if arguments.hold.is_some() { Ok(()) } else { Err("interrupted".into()) }),
        done = work(&arguments, directory.path().to_owned(), &mut stack, &mut show) => done,
    };

    let mut code = ExitCode::SUCCESS;
    if let Err(error) = &done {
        code = report(error);
    }
    if let Some(stack) = stack {
        if done.is_err() {
            for name in ["controller", "pve-sim"] {
                let log = stack.log(name);
                let tail: Vec<&str> = log.lines().rev().take(5).collect();
                tail.into_iter().rev().for_each(|line| eprintln!("  {name}: {line}"));
            }
        }
        for left in stack.stop().await {
            eprintln!("left over: {left}");
            code = ExitCode::FAILURE;
        }
    }
    if let Err(error) = directory.close() {
        code = report(&error.into());
    } else if arguments.hold.is_none() {
        println!("\nNo mount, loop device, process or file is left.");
    }
    code
}

async fn work(
    arguments: &Arguments,
    directory: PathBuf,
    stack: &mut Option<Stack>,
    show: &mut Show,
) -> Result<(), Fail> {
    let mut world = arguments.world.clone();
    if let Some(image) = &arguments.image {
        let file = directory.join("world.yaml");
        fs::write(&file, serde_saphyr::to_string(&guest::world(image)?)?)?;
        println!("Two VMs boot a kernel each, in software: this takes a moment.");
        world = Some(file);
    }
    Stack::start(&directory, &arguments.time, world.as_deref(), stack).await?;
    let Some(stack) = stack else { return Err("the stack did not start".into()) };
    if let Some(file) = &arguments.hold {
        let workers = stack.workers.iter().map(|worker| {
            (
                worker.name.clone(),
                serde_json::json!({ "endpoint": worker.endpoint(), "zone": worker.pve_node }),
            )
        });
        let told = serde_json::json!({
            "directory": stack.directory,
            "controller": format!("unix://{}", stack.controller.display()),
            "workers": workers.collect::<serde_json::Map<_, _>>(),
            "url": stack.url,
            "ca": stack.ca,
        });
        // In one step: who waits for the file must not read half of it.
        let half = file.with_extension("tmp");
        fs::write(&half, told.to_string())?;
        fs::rename(&half, file)?;
        return std::future::pending().await;
    }
    println!("A Proxmox VE cluster is simulated at {} (its CA: {}).", stack.url, stack.ca.display());
    for worker in &stack.workers {
        let is = if worker.guest.is_some() { "a QEMU of its own" } else { "this machine" };
        println!(
            "VM {} on {} is {is} as {}; its node plugin: {}",
            worker.vmid,
            worker.pve_node,
            worker.name,
            worker.endpoint()
        );
    }
    println!("The controller: {}", stack.controller.display());
    let stops = life::Stops { fail_after: arguments.fail_after, pause_after: arguments.pause_after };
    life::run(stack, show, stops).await
}

async fn interrupt() -> Result<(), Fail> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        biased;
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

fn report(error: &Fail) -> ExitCode {
    eprintln!("\nerror: {error}");
    ExitCode::FAILURE
}
