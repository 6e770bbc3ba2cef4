//! The last answer of `GET /cluster/resources`: one request serves all operations of a region.
//!
//! It says where VMs and storages are, which changes seldom and shows when it did: a request to a node that a VM has left is refused. It is
//! never a proof that something is absent.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Mutex, time::Instant};

use crate::pve::{ApiError, Client, cluster::Resources};

/// How often the background asks.
pub(super) const POLL_EVERY: Duration = Duration::from_secs(10);
/// How old an answer may be that an operation goes by: one that the background missed once is still served.
const POLL_AGE: Duration = Duration::from_secs(25);

/// The last answer of a region.
#[derive(Default)]
pub(super) struct Poll {
    last: Mutex<Option<(Instant, Arc<Resources>)>>,
}

impl Poll {
    /// A late answer, or a new one where there is none. Cancelling it does no harm.
    pub(super) async fn recent(&self, client: &Client) -> Result<Arc<Resources>, ApiError> {
        let mut last = self.last.lock().await;
        if let Some((asked, resources)) = &*last
            && asked.elapsed() < POLL_AGE
        {
            return Ok(Arc::clone(resources));
        }
        Self::ask(&mut last, client).await
    }

    /// A new answer.
    pub(super) async fn fresh(&self, client: &Client) -> Result<Arc<Resources>, ApiError> {
        Self::ask(&mut *self.last.lock().await, client).await
    }

    async fn ask(
        last: &mut Option<(Instant, Arc<Resources>)>,
        client: &Client,
    ) -> Result<Arc<Resources>, ApiError> {
        let asked = Instant::now();
        let resources = Arc::new(client.resources().await?);
        *last = Some((asked, Arc::clone(&resources)));
        Ok(resources)
    }
}
