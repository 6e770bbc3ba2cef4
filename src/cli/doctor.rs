//! `proxmox-csi doctor`: what is wrong, what to do about it, and, when told to, the repairs that are provably safe.

use std::{
    fmt::Write as _,
    io::{BufRead as _, IsTerminal as _},
    time::Duration,
};

use clap::Args;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{
    Exit, Failed, controller,
    tools::{self, Output, Paint, ToolArgs, Tools},
};
use crate::{
    doctor::{
        diagnose,
        finding::{Code, Finding, Remark, Report, Severity},
        repair::{self, Act, Done},
        view::Depth,
    },
    k8s::lease::{self, Election},
    volume::Volumes,
};

/// What `proxmox-csi doctor` takes.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own on the command line")]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    pub(super) tool: ToolArgs,

    /// List no storage: quick, and blind for volumes without a PV and PVs without a volume
    #[arg(long)]
    fast: bool,

    /// Leave out findings of this code; may be given several times
    #[arg(long, value_name = "CODE")]
    ignore: Vec<Code>,

    /// Print the codes of all findings with what they mean, and end
    #[arg(long)]
    codes: bool,

    /// Do the repairs of the plan, after a question: detach volumes that nothing uses, remove left-over short-lived VMs. Takes the
    /// controller's lease, so the controller must be stopped before
    #[arg(long)]
    repair: bool,

    /// With --repair: do not ask
    #[arg(long, requires = "repair")]
    yes: bool,

    /// With --repair: name of the controller's Lease
    #[arg(long, default_value = "proxmox-csi-controller", value_name = "NAME")]
    lease_name: String,

    /// With --repair: its namespace; without it that of the pod or the kubeconfig
    #[arg(long, value_name = "NAMESPACE")]
    lease_namespace: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  proxmox-csi doctor --cloud-config config.yaml --kubeconfig ~/.kube/config
      everything, from a workstation
  kubectl -n csi-proxmox exec deploy/proxmox-csi-controller -- proxmox-csi doctor
      the same in the controller's pod, with its configuration and service account
  proxmox-csi doctor --fast --ignore volume-orphan
      quick, and without what is known
  proxmox-csi doctor -o json | jq -r '.findings[] | select(.severity == \"error\") | .text'
      for programs
  proxmox-csi doctor --repair
      look, show the plan, ask, act, and look again

Exit codes: 0 nothing to see to, 1 findings, 2 the command line, 3 the configuration.";

/// How long a repair waits for the lease: longer than a controller that died without giving it back keeps it.
const LEASE_PATIENCE: Duration = Duration::from_secs(25);

/// What programs read.
#[derive(Serialize)]
struct Document<'a> {
    schema: u32,
    command: &'static str,
    ok: bool,
    passed: &'a [Remark],
    findings: &'a [Finding],
    unseen: &'a [Remark],
    plan: Vec<String>,
    repairs: Vec<Repaired>,
}

#[derive(Serialize)]
struct Repaired {
    act: String,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

pub(super) async fn run(args: DoctorArgs) -> Result<Exit, Failed> {
    if args.codes {
        return codes(args.tool.output);
    }
    let tools = Tools::open(&args.tool).await?;
    if args.repair && tools.kube.is_none() {
        return Err(Failed {
            exit: Exit::BadConfig,
            text: "--repair needs Kubernetes: without it nothing is proven to be unused, and there is no lease that keeps the controller away; name it with --kubeconfig".to_owned(),
        });
    }
    let (mut report, mut plan) = examine(&tools, &args).await;
    let mut repairs = Vec::new();
    if args.repair && !plan.is_empty() {
        if args.tool.output != Output::Json {
            tools::print(&shown(&report, &plan, Paint::of_stdout()));
        }
        if !args.yes && !asked(plan.len())? {
            return Ok(Exit::Findings);
        }
        repairs = act(&tools, &args, &plan).await?;
        (report, plan) = examine(&tools, &args).await;
    }
    let failed = repairs.iter().any(|one| one.error.is_some());
    let needs_action = report.needs_action() || failed;
    if args.tool.output == Output::Json {
        tools::print_json(&Document {
            schema: 1,
            command: "doctor",
            ok: !needs_action,
            passed: &report.passed,
            findings: &report.findings,
            unseen: &report.unseen,
            plan: plan.iter().map(ToString::to_string).collect(),
            repairs,
        })?;
    } else {
        let mut text = String::new();
        for one in &repairs {
            let error = one.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
            let _ = writeln!(text, "{}: {}{error}", one.outcome, one.act);
        }
        if !repairs.is_empty() {
            text.push('\n');
        }
        text.push_str(&shown(&report, &plan, Paint::of_stdout()));
        tools::print(&text);
    }
    Ok(tools::exit(needs_action))
}

async fn examine(tools: &Tools, args: &DoctorArgs) -> (Report, Vec<Act>) {
    let (view, book) = tools.look(Depth { servers: true, listings: !args.fast }).await;
    let mut report = diagnose(&view, &book, &tools.config.warnings);
    report.findings.retain(|finding| !args.ignore.contains(&finding.code));
    (report, repair::plan(&view, &book))
}

/// Asks a person; without one the answer is an error that says how to go without.
fn asked(count: usize) -> Result<bool, Failed> {
    if !std::io::stdin().is_terminal() {
        return Err(Failed {
            exit: Exit::Findings,
            text: format!(
                "{count} repairs are planned and nobody can be asked; to do them without a question add --yes"
            ),
        });
    }
    eprint!("Do {}? [y/N] ", if count == 1 { "this repair" } else { "these repairs" });
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(|error| Failed::running(&error))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Takes the lease, acts, and gives it back.
async fn act(tools: &Tools, args: &DoctorArgs, plan: &[Act]) -> Result<Vec<Repaired>, Failed> {
    let kube = tools.kube.clone().expect("a repair without Kubernetes was refused above");
    let namespace = args.lease_namespace.clone().unwrap_or_else(|| kube.default_namespace().to_owned());
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "proxmox-csi".to_owned());
    let settings = lease::Settings::new(&namespace, &args.lease_name, &format!("{host}-doctor"));
    let (election, leadership) = Election::new(kube, settings);
    let release = CancellationToken::new();
    let elected = tokio::spawn(election.run(release.clone()));
    let mut waiting = leadership.clone();
    let acquired = tokio::time::timeout(LEASE_PATIENCE, waiting.acquired()).await.is_ok();
    let result = if acquired {
        let (led, gate) = controller::lead(leadership);
        // After a controller that died with it, until nothing of it can be at work.
        led.await;
        match tools.volumes(&gate) {
            Ok(volumes) => Ok(carry_out(tools, plan, &volumes).await),
            Err(failed) => Err(failed),
        }
    } else {
        Err(Failed {
            exit: Exit::Failure,
            text: format!(
                "another process holds the Lease `{}` in namespace `{namespace}`, and only its holder may change anything; hint: stop the controller (`kubectl -n {namespace} scale deployment NAME --replicas 0`), repair, and start it again. Nothing was changed",
                args.lease_name
            ),
        })
    };
    release.cancel();
    // Its own deadline bounds it; a panic there has nothing to give back.
    let _ = elected.await;
    result
}

async fn carry_out(tools: &Tools, plan: &[Act], volumes: &Volumes) -> Vec<Repaired> {
    let mut repairs = Vec::new();
    let look = || -> futures_util::future::BoxFuture<'_, _> {
        Box::pin(tools.look(Depth { servers: false, listings: false }))
    };
    repair::carry_out(plan, volumes, look, |act, done| {
        let (outcome, error) = match done {
            Done::Repaired => ("repaired", None),
            Done::Skipped => ("skipped, since it is not needed or not safe any more", None),
            Done::Failed(why) => ("failed", Some(why.clone())),
        };
        repairs.push(Repaired { act: act.to_string(), outcome, error });
    })
    .await;
    repairs
}

fn shown(report: &Report, plan: &[Act], paint: Paint) -> String {
    let mut text = String::new();
    let mut areas: Vec<&str> = Vec::new();
    let named = report.passed.iter().map(|one| &one.area).chain(report.unseen.iter().map(|one| &one.area));
    for area in named.chain(report.findings.iter().map(|one| &one.area)) {
        if !areas.contains(&area.as_str()) {
            areas.push(area);
        }
    }
    // From the outside in: what comes first may be the cause of what comes later.
    areas.sort_by_key(|area| match *area {
        "configuration" => 0,
        "kubernetes" => 2,
        "volumes" => 3,
        _ => 1,
    });
    for area in areas {
        let _ = writeln!(text, "{}", paint.bold(area));
        for one in report.passed.iter().filter(|one| one.area == area) {
            let _ = write!(
                text,
                "  {}  {}",
                paint.good("ok       "),
                tools::wrapped(&one.text, "             ").trim_start()
            );
        }
        for one in report.unseen.iter().filter(|one| one.area == area) {
            let _ = write!(
                text,
                "  {}  {}",
                paint.dim("not seen "),
                tools::wrapped(&one.text, "             ").trim_start()
            );
        }
        for one in report.findings.iter().filter(|one| one.area == area) {
            text.push_str(&finding(one, paint));
        }
        text.push('\n');
    }
    let count = |severity| report.findings.iter().filter(|one| one.severity == severity).count();
    let several = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    if report.findings.is_empty() {
        text.push_str("nothing was found\n");
    } else {
        let _ = writeln!(
            text,
            "{}, {}, {}",
            several(count(Severity::Error), "error"),
            several(count(Severity::Warning), "warning"),
            several(count(Severity::Note), "note")
        );
    }
    if !plan.is_empty() {
        let _ = writeln!(text, "\n{}", paint.bold("provably safe to repair (with --repair)"));
        for act in plan {
            let _ = writeln!(text, "  {act}");
        }
    }
    text
}

/// A finding as a person reads it; `explain` tells them in the same form.
pub(super) fn finding(one: &Finding, paint: Paint) -> String {
    let indent = "             ";
    let severity = format!("{:<9}", one.severity.to_string());
    let mut text = format!(
        "  {}  {}: {}\n",
        paint.severity(one.severity, &severity),
        paint.bold(one.code.as_str()),
        one.subject
    );
    text.push_str(&tools::wrapped(&one.text, indent));
    if let Some(hint) = &one.hint {
        text.push_str(&tools::wrapped(&format!("hint: {hint}"), indent));
    }
    for command in &one.commands {
        let _ = writeln!(text, "{indent}$ {command}");
    }
    if let Some(repair) = &one.repair {
        text.push_str(&tools::wrapped(&format!("repair: {repair}"), indent));
    }
    text
}

fn codes(output: Output) -> Result<Exit, Failed> {
    #[derive(Serialize)]
    struct One {
        code: Code,
        severity: Severity,
        meaning: &'static str,
    }
    if output == Output::Json {
        let all = Code::ALL.iter().map(|code| One {
            code: *code,
            severity: code.severity(),
            meaning: code.meaning(),
        });
        tools::print_json(&all.collect::<Vec<_>>())?;
    } else {
        let row = |code: &Code| {
            vec![code.as_str().to_owned(), code.severity().to_string(), code.meaning().to_owned()]
        };
        let rows: Vec<Vec<String>> = Code::ALL.iter().map(row).collect();
        tools::print(&tools::table(&["CODE", "SEVERITY", "MEANING"], &rows, Paint::of_stdout()));
    }
    Ok(Exit::Success)
}
