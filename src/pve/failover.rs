//! Several servers of one region as one transport. [`region`] is the whole of it.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tower::{ServiceExt as _, util::BoxCloneSyncService};

use super::transport::{Answerer, HttpRequest, HttpResponse, Transport, TransportError};
use crate::{telemetry::pve::PveMetrics, types::Region};

/// How long a server that failed is asked only when no other can be reached.
const AVOIDED: Duration = Duration::from_secs(30);
/// How long a server whose answer was doubted is asked only when no better one answers, and how long it is not doubted again: where the
/// others are dead, each of them is tried once in that time.
const DOUBTED: Duration = Duration::from_mins(5);
/// A request that was given up after this time was given up because of the server.
const SILENT: Duration = Duration::from_secs(10);

/// A server of a region.
pub struct Server {
    /// What it is called in logs: its address.
    pub name: String,
    /// How it is reached.
    pub transport: Transport,
}

struct Member {
    server: Server,
    failed: Mutex<Option<Instant>>,
    doubt: Mutex<Option<Doubt>>,
}

/// A doubt about a server that answers.
#[derive(Clone, Copy)]
struct Doubt {
    since: Instant,
    /// Whether a better one is still looked for.
    open: bool,
}

struct Servers {
    region: String,
    members: Vec<Member>,
    preferred: AtomicUsize,
    metrics: PveMetrics,
}

/// The servers of a region as one transport; there must be at least one, `None` otherwise.
///
/// A request goes to the server that answered last, for as long as it answers. Where it was certainly not sent it goes to the next one;
/// where it may have arrived it is not sent again, but the next request goes elsewhere. A server that failed is passed over for a while,
/// and asked all the same when every other one fails; one that answers but is doubted (see [`Answerer`]) comes before those.
pub fn region(region: &Region, servers: Vec<Server>, metrics: &PveMetrics) -> Option<Transport> {
    if servers.is_empty() {
        return None;
    }
    let members = servers.into_iter().map(|server| Member {
        server,
        failed: Mutex::default(),
        doubt: Mutex::default(),
    });
    let all = Arc::new(Servers {
        region: region.to_string(),
        members: members.collect(),
        preferred: AtomicUsize::new(0),
        metrics: metrics.clone(),
    });
    let service = tower::service_fn(move |request: HttpRequest| {
        let all = Arc::clone(&all);
        async move { all.send(request).await }
    });
    Some(BoxCloneSyncService::new(service))
}

impl Servers {
    async fn send(self: &Arc<Self>, request: HttpRequest) -> Result<HttpResponse, TransportError> {
        let first = self.preferred.load(Ordering::Relaxed);
        let mut last = TransportError::NotSent("no server".to_owned());
        for index in self.order(first) {
            let member = &self.members[index];
            let mut flight = Flight { all: self, index, since: Instant::now(), ended: false };
            let answer = member.server.transport.clone().oneshot(request.clone()).await;
            flight.ended = true;
            match answer {
                Ok(response) => {
                    self.answered(index, first);
                    if let Some(answerer) = request.extensions().get::<Answerer>() {
                        let all = Arc::clone(self);
                        answerer.note(move |why| all.doubt(index, why));
                    }
                    return Ok(response);
                }
                Err(TransportError::NotSent(why)) => {
                    self.failed(index, &why);
                    last = TransportError::NotSent(why);
                }
                Err(error) => {
                    self.failed(index, &error.to_string());
                    return Err(error);
                }
            }
        }
        Err(last)
    }

    /// The servers in the order in which they are asked: from the preferred one on, then those that are doubted, and those that failed
    /// lately last, oldest failure first.
    fn order(&self, first: usize) -> Vec<usize> {
        let now = Instant::now();
        let count = self.members.len();
        let failed = |index: usize| {
            let failed = *lock(&self.members[index].failed);
            failed.filter(|at| now.duration_since(*at) < AVOIDED)
        };
        let mut order: Vec<usize> = (0..count).map(|turn| (first + turn) % count).collect();
        let doubted = |index: usize| {
            let doubt = *lock(&self.members[index].doubt);
            doubt
                .filter(|doubt| doubt.open && now.duration_since(doubt.since) < DOUBTED)
                .map(|doubt| doubt.since)
        };
        // Stable: servers of which nothing is to be said keep their order.
        order.sort_by_key(|index| (failed(*index), doubted(*index)));
        order
    }

    fn answered(&self, index: usize, first: usize) {
        let member = &self.members[index];
        let recovered = lock(&member.failed).take().is_some();
        if recovered {
            tracing::info!(region = self.region, server = member.server.name, "a server answers again");
        }
        // It was its turn all the same: there is no better one for now.
        if let Some(doubt) = lock(&member.doubt).as_mut() {
            doubt.open = false;
        }
        // Whoever was slower than another request does not undo what that one found.
        if index != first
            && self.preferred.compare_exchange(first, index, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.metrics.failover(&self.region);
            tracing::info!(region = self.region, server = member.server.name, "using another server");
        }
    }

    /// A server answered, and what it said shows that another would be a better one to ask.
    fn doubt(&self, index: usize, why: &str) {
        let member = &self.members[index];
        let mut doubt = lock(&member.doubt);
        let lately = doubt.is_some_and(|doubt| doubt.since.elapsed() < DOUBTED);
        if lately || self.members.len() == 1 {
            return;
        }
        *doubt = Some(Doubt { since: Instant::now(), open: true });
        tracing::warn!(region = self.region, server = member.server.name, why, "looking for a better server");
    }

    fn failed(&self, index: usize, why: &str) {
        let member = &self.members[index];
        let before = lock(&member.failed).replace(Instant::now());
        if before.is_none() {
            tracing::warn!(region = self.region, server = member.server.name, error = why, "a server failed");
        } else {
            tracing::debug!(
                region = self.region,
                server = member.server.name,
                error = why,
                "a server failed again"
            );
        }
    }
}

/// A request at a server; dropped before its end it was given up.
struct Flight<'a> {
    all: &'a Servers,
    index: usize,
    since: Instant,
    ended: bool,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if !self.ended && self.since.elapsed() >= SILENT {
            self.all.failed(self.index, "no answer in time");
        }
    }
}

/// A panic while it was locked can't have left it half changed: each change is one call.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Mood {
        Good,
        Refusing,
        Resetting,
        Silent,
    }

    /// A server, its mood, and how often it was asked.
    #[derive(Clone)]
    struct Fake(Arc<Mutex<(Mood, u32)>>);

    impl Fake {
        fn new(mood: Mood) -> Self {
            Self(Arc::new(Mutex::new((mood, 0))))
        }

        fn set(&self, mood: Mood) {
            lock(&self.0).0 = mood;
        }

        /// How often it was asked since the last time.
        fn asked(&self) -> u32 {
            std::mem::take(&mut lock(&self.0).1)
        }

        fn server(&self) -> Server {
            let this = self.clone();
            let service = tower::service_fn(move |_: HttpRequest| {
                let mood = {
                    let mut state = lock(&this.0);
                    state.1 += 1;
                    state.0
                };
                async move {
                    match mood {
                        Mood::Good => Ok(http::Response::new(Bytes::new())),
                        Mood::Refusing => Err(TransportError::NotSent("refused".into())),
                        Mood::Resetting => Err(TransportError::MaybeSent("reset".into())),
                        Mood::Silent => std::future::pending().await,
                    }
                }
            });
            Server { name: "test".to_owned(), transport: BoxCloneSyncService::new(service) }
        }
    }

    fn both(a: &Fake, b: &Fake) -> Transport {
        let name = "r1".parse().expect("a region");
        region(&name, vec![a.server(), b.server()], &PveMetrics::default()).expect("two servers")
    }

    async fn ask(transport: &Transport) -> Result<HttpResponse, TransportError> {
        transport.clone().oneshot(http::Request::new(Bytes::new())).await
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_sent_goes_to_the_next_server_and_stays_there() {
        let (dead, good) = (Fake::new(Mood::Refusing), Fake::new(Mood::Good));
        let both = both(&dead, &good);
        for _ in 0..3 {
            ask(&both).await.expect("an answer");
        }
        assert_eq!((dead.asked(), good.asked()), (1, 3));
        // It has recovered, and the other one still answers: there is no reason to change.
        dead.set(Mood::Good);
        tokio::time::sleep(AVOIDED * 2).await;
        ask(&both).await.expect("an answer");
        assert_eq!((dead.asked(), good.asked()), (0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_have_arrived_is_never_sent_again_but_the_next_request_goes_elsewhere() {
        let (half_dead, good) = (Fake::new(Mood::Resetting), Fake::new(Mood::Good));
        let both = both(&half_dead, &good);
        assert!(matches!(ask(&both).await, Err(TransportError::MaybeSent(_))));
        ask(&both).await.expect("an answer");
        assert_eq!((half_dead.asked(), good.asked()), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_silent_is_passed_over_for_a_while_and_then_asked_again() {
        let (silent, other) = (Fake::new(Mood::Silent), Fake::new(Mood::Good));
        let both = both(&silent, &other);
        assert!(tokio::time::timeout(SILENT * 2, ask(&both)).await.is_err());
        ask(&both).await.expect("the other one answers");
        assert_eq!((silent.asked(), other.asked()), (1, 1));
        silent.set(Mood::Good);
        other.set(Mood::Refusing);
        tokio::time::sleep(AVOIDED).await;
        ask(&both).await.expect("the first one answers again");
        assert_eq!((silent.asked(), other.asked()), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_gives_up_early_blames_no_server() {
        let (silent, other) = (Fake::new(Mood::Silent), Fake::new(Mood::Good));
        let both = both(&silent, &other);
        assert!(tokio::time::timeout(SILENT / 2, ask(&both)).await.is_err());
        silent.set(Mood::Good);
        ask(&both).await.expect("an answer");
        assert_eq!((silent.asked(), other.asked()), (2, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_doubted_is_left_for_another_and_kept_where_the_others_are_dead() {
        async fn ask_and_doubt(transport: &Transport) {
            let answerer = Answerer::default();
            let mut request = http::Request::new(Bytes::new());
            request.extensions_mut().insert(answerer.clone());
            transport.clone().oneshot(request).await.expect("an answer");
            answerer.doubt("it sees 1 of 3 nodes");
        }
        let (minority, other) = (Fake::new(Mood::Good), Fake::new(Mood::Good));
        let transport = both(&minority, &other);
        ask_and_doubt(&transport).await;
        for _ in 0..2 {
            ask(&transport).await.expect("an answer");
        }
        assert_eq!((minority.asked(), other.asked()), (1, 2), "the other one is asked from then on");

        let (minority, dead) = (Fake::new(Mood::Good), Fake::new(Mood::Refusing));
        let transport = both(&minority, &dead);
        for _ in 0..3 {
            ask_and_doubt(&transport).await;
            tokio::time::sleep(AVOIDED * 2).await;
        }
        assert_eq!(
            (minority.asked(), dead.asked()),
            (3, 1),
            "a dead one is tried once, not before each request"
        );
        tokio::time::sleep(DOUBTED).await;
        ask_and_doubt(&transport).await;
        dead.set(Mood::Good);
        ask(&transport).await.expect("an answer");
        assert_eq!((minority.asked(), dead.asked()), (1, 1), "and once more later");
    }

    #[tokio::test(start_paused = true)]
    async fn where_no_server_can_be_reached_each_is_tried_and_nothing_was_sent() {
        let (a, b) = (Fake::new(Mood::Refusing), Fake::new(Mood::Refusing));
        let both = both(&a, &b);
        for _ in 0..2 {
            assert!(matches!(ask(&both).await, Err(TransportError::NotSent(_))));
            assert_eq!((a.asked(), b.asked()), (1, 1), "a server that failed is the last resort");
        }
        let name = "r1".parse().expect("a region");
        assert!(region(&name, Vec::new(), &PveMetrics::default()).is_none());
    }
}
