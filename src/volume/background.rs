//! What goes on between operations, so that they find what they need: one poll for each region, and sweeps ahead of the next question.

use std::convert::Infallible;

use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{RegionState, Volumes, poll::POLL_EVERY, sweep::SWEEP_EVERY};

impl Volumes {
    /// Keeps what operations go by current, for ever, while `may_act` says that this process may act. Dropping it does no harm: operations
    /// then ask for themselves.
    pub async fn keep_current(&self, may_act: impl Fn() -> bool) -> Infallible {
        let may_act = &may_act;
        // Each region for itself: one that does not answer holds up no other.
        let regions = self.inner.regions.values().map(|region| self.keep_region_current(region, may_act));
        futures_util::future::join_all(regions).await;
        std::future::pending().await
    }

    async fn keep_region_current(&self, state: &RegionState, may_act: &impl Fn() -> bool) -> Infallible {
        let mut ticks = interval(POLL_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut swept: Option<Instant> = None;
        let region = state.client.region();
        loop {
            ticks.tick().await;
            if !may_act() {
                continue;
            }
            if let Err(error) = state.poll.fresh(&state.client).await {
                tracing::warn!(%region, %error, "cannot list what the region has");
                continue;
            }
            if swept.is_some_and(|at| at.elapsed() + POLL_EVERY / 2 < SWEEP_EVERY) {
                continue;
            }
            swept = Some(Instant::now());
            match state.sweeps.ahead(state).await {
                Ok(()) => self.tidy_region(state).await,
                Err(error) => tracing::warn!(%region, %error, "cannot read who holds what"),
            }
        }
    }
}
