//! What the tools for operators know: what is there, what of it is wrong, what can be done about it.
//!
//! [`view::look`] reads, and only reads. [`book::Book`] brings together what Kubernetes, the storages, the configs of VMs and their QEMU
//! say of each volume. [`diagnose`] concludes; every conclusion is a pure function over what was read. [`repair`] acts, through
//! [`crate::volume`] and behind its gate, on the little that is provably safe. [`explain`] tells all about one volume, and rehearses
//! what the driver would do with it: by doing it, over a transport that lets nothing pass that changes something.

pub mod book;
mod checks;
pub mod explain;
pub mod finding;
pub mod repair;
pub mod rows;
pub mod server;
pub mod view;

use finding::Report;
use view::View;

/// Everything that is wrong with what was seen. `warnings` are those of the configuration file.
pub fn diagnose(view: &View, book: &book::Book, warnings: &[String]) -> Report {
    let mut report = Report::default();
    checks::configuration(warnings, view, &mut report);
    for region in &view.regions {
        checks::region(view, region, &mut report);
    }
    checks::cluster(view, &mut report);
    checks::volumes(view, book, &mut report);
    report.sort();
    report
}
