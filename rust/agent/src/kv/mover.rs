//! The thread: sleeps until something happens, moves everything along, sleeps again.

use std::{
    collections::VecDeque,
    io,
    os::fd::BorrowedFd,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use orchestra_core::{BlockId, HashSeed, step::HoldId};
use orchestra_memory::{Arrival, Event, PeerId, Rights};
use orchestra_proto::v1::{self, kv_message::Message};
use rustix::{
    event::{PollFd, PollFlags, poll},
    time::Timespec,
};
use tokio::sync::mpsc::{WeakSender, error::TrySendError};

use super::{
    ending::{Ending, Endings},
    inbox::{Inbox, Offered, Order, Report, StepProgress},
    incoming::IncomingMoves,
    offering::Offers,
    peers::Peers,
    pool::KvPool,
    pushing::Pushes,
    serving::Servings,
    wire,
};
use crate::{attachment::Command, load::LoadBoard};

/// How long the transports may work before everything else is looked at again.
const BUDGET: Duration = Duration::from_millis(2);
/// Longest sleep while something is under way: deadlines are looked at this often.
const TICK: Duration = Duration::from_millis(5);

/// Reports that wait for the step loop, beyond which nothing more is kept for others.
const REPORTS_MAX: usize = 256;

/// What every part of the thread works with.
pub(super) struct Desk {
    pub(super) pool: Arc<KvPool>,
    pub(super) endings: Endings,
    worker_id: String,
    peers: Peers,
    /// Where messages to other workers go; none while no router is attached.
    uplink: Option<WeakSender<v1::WorkerMessage>>,
    /// What the step loop has not been told yet: at most what its queue lacks room for.
    reports: VecDeque<Report>,
    board: Arc<LoadBoard>,
}

impl Desk {
    /// A message to another worker; `false` where no router takes it now.
    pub(super) fn send(&self, worker_id: &str, transfer_id: u64, message: Message) -> bool {
        let Some(payload) = wire::encode(transfer_id, message) else {
            return false;
        };
        let message = v1::PeerMessage {
            worker_id: worker_id.to_owned(),
            payload,
            is_undeliverable: false,
        };
        let message = v1::WorkerMessage {
            message: Some(v1::worker_message::Message::ToPeer(message)),
        };
        let uplink = self.uplink.as_ref().and_then(WeakSender::upgrade);
        uplink.is_some_and(|it| it.try_send(message).is_ok())
    }

    pub(super) fn connect(&mut self, to: &v1::KvPeer) -> Option<PeerId> {
        let connected = self.peers.connect(&self.pool, to);
        if let Err(error) = &connected {
            tracing::debug!(worker_id = to.worker_id, %error, "a worker's KV cannot be reached");
        }
        connected.ok()
    }

    pub(super) fn leave(&mut self, epoch: u64) {
        self.peers.leave(&self.pool, epoch);
    }

    /// What another worker needs to reach this one.
    pub(super) fn ourselves(&self) -> v1::KvPeer {
        let announced = self.pool.announcement();
        v1::KvPeer {
            worker_id: self.worker_id.clone(),
            epoch: announced.epoch,
            metadata: announced.metadata.clone(),
            host: announced.host.clone(),
        }
    }

    pub(super) fn report(&mut self, report: Report) {
        self.reports.push_back(report);
    }

    pub(super) fn arrived(&mut self, hold: HoldId, num_blocks: u32) {
        self.report(Report::Arrived(hold, num_blocks));
    }

    /// Blocks that do not come, and that nobody has been let near.
    pub(super) fn give_up(&mut self, hold: HoldId) {
        self.released(hold);
    }

    /// Blocks that do not come, and that may not be quiet yet.
    pub(super) fn fail(&mut self, hold: HoldId, blocks: Vec<BlockId>) {
        self.report(Report::Failed(hold));
        self.endings.add(Ending {
            holds: vec![hold],
            blocks,
            answer: None,
        });
    }

    pub(super) fn released(&mut self, hold: HoldId) {
        self.report(Report::Released(hold));
    }

    pub(super) fn pushed(&self, num_blocks: u64) {
        self.board
            .update(|stats| stats.kv_blocks_pushed += num_blocks);
    }

    pub(super) fn written_through(&self, num_blocks: u64) {
        self.board
            .update(|stats| stats.kv_blocks_written_through += num_blocks);
    }

    /// Gives back what is quiet.
    fn settle(&mut self) {
        for ending in self.endings.settle(&self.pool) {
            for hold in ending.holds {
                self.released(hold);
            }
            if let Some((worker_id, transfer_id)) = ending.answer {
                let refusal = Message::Refusal(v1::KvRefusal {});
                self.send(&worker_id, transfer_id, refusal);
            }
        }
    }
}

/// The thread's state.
pub(crate) struct Mover {
    desk: Desk,
    inbox: Arc<Inbox>,
    commands: WeakSender<Command>,
    incoming: IncomingMoves,
    servings: Servings,
    pushes: Pushes,
    offers: Offers,
}

/// Runs the thread until it is told to stop.
pub(crate) fn start(mover: Mover) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name("orchestra-kv".to_owned())
        .spawn(move || mover.run())
}

impl Mover {
    pub(crate) fn new(
        pool: Arc<KvPool>,
        inbox: Arc<Inbox>,
        commands: WeakSender<Command>,
        worker_id: String,
        board: Arc<LoadBoard>,
    ) -> Self {
        let desk = Desk {
            pool,
            endings: Endings::default(),
            worker_id,
            peers: Peers::default(),
            uplink: None,
            reports: VecDeque::new(),
            board,
        };
        Self {
            desk,
            inbox,
            commands,
            incoming: IncomingMoves::default(),
            servings: Servings::default(),
            pushes: Pushes::default(),
            offers: Offers::default(),
        }
    }

    fn run(mut self) {
        loop {
            let (orders, messages, progress) = self.inbox.take();
            for order in orders {
                if matches!(order, Order::Stop) {
                    return;
                }
                self.obey(order);
            }
            for message in messages {
                self.hear(&message);
            }
            let mut moved = self.move_along(progress);
            self.desk.settle();
            self.desk.peers.tick(&self.desk.pool);
            moved += self.send_reports();
            if moved == 0 {
                self.sleep();
            }
        }
    }

    /// Lets the transports and every move do what they can; returns how many things happened.
    fn move_along(&mut self, progress: StepProgress) -> usize {
        let desk = &mut self.desk;
        let pool = Arc::clone(&desk.pool);
        let mut moved = self.pushes.poll(progress, desk);
        moved += pool.manager().progress(pool.now(), BUDGET);
        while let Some(event) = pool.manager().take_event() {
            moved += 1;
            match event {
                Event::Arrived(arrival) if arrival.ends_grant => {
                    let Arrival { grant, rights, .. } = arrival;
                    match rights {
                        Rights::Read => {
                            if let Some((transfer_id, count)) = self.servings.on_read(grant, desk) {
                                self.offers.on_read(transfer_id, count, desk);
                            }
                        }
                        Rights::Write => self.incoming.on_written(grant, desk),
                    }
                }
                // One layer of many is there; or the move was given up here, and its deadline or the peer's answer to
                // that says what there is to say.
                Event::Arrived(_) | Event::Stale { .. } | Event::WriteGrantExpired(_) => {}
                Event::Malformed(_) => tracing::warn!("a worker sent what none of ours sends"),
            }
        }
        self.incoming.poll(desk);
        self.servings.poll(desk);
        self.offers.poll(desk);
        moved
    }

    fn obey(&mut self, order: Order) {
        let desk = &mut self.desk;
        match order {
            Order::Attached(uplink) => desk.uplink = Some(uplink),
            Order::Detached => {
                self.incoming.abandon_all(desk);
                self.pushes.abandon_all(desk);
                self.offers.forget_all();
                desk.uplink = None;
            }
            Order::Take(order) => self.incoming.take(order, desk),
            Order::Abandon(hold) => self.incoming.abandon(hold, desk),
            Order::Decline(worker_id, transfer_id) => {
                desk.send(&worker_id, transfer_id, Message::Stop(v1::KvStop {}));
            }
            Order::Held(number, held) => {
                if let Some(refused) = self.servings.on_held(number, held.as_ref(), desk) {
                    self.offers.end(refused, desk);
                }
            }
            Order::NotNow(number) => {
                if let Some(refused) = self.servings.on_held(number, None, desk) {
                    self.offers.put_off(refused, desk);
                }
            }
            Order::Offer(keeper, chain) => self.offers.offer(&keeper, chain, desk),
            Order::NewKeeper => self.offers.put_off_all(desk),
            Order::Push(order) => self.pushes.begin(&order, desk),
            Order::Filled(step_id, filled) => self.pushes.on_filled(step_id, filled, desk),
            Order::PushEnded(id, is_whole) => self.pushes.on_ended(id, is_whole, desk),
            // The loop has seen it before.
            Order::Stop => {}
        }
    }

    fn hear(&mut self, message: &v1::PeerMessage) {
        let desk = &mut self.desk;
        let worker_id = &message.worker_id;
        if message.is_undeliverable {
            // An offer waits for its deadline or for another keeper, else the next would follow at once, and be lost too.
            return self.incoming.lost_touch(worker_id, desk);
        }
        let Some((transfer_id, message)) = wire::decode(&message.payload) else {
            tracing::warn!(worker_id, "a worker's message cannot be read");
            return;
        };
        match message {
            Message::Ask(ask) => {
                let is_offered = self.offers.has(worker_id, transfer_id);
                self.servings
                    .on_ask(worker_id, transfer_id, ask, is_offered, desk);
            }
            Message::Offer(offer) => hear_offer(worker_id, transfer_id, offer, desk),
            Message::Stop(_) if self.offers.has(worker_id, transfer_id) => {
                self.servings.on_stop(worker_id, transfer_id, desk);
                self.offers.end(transfer_id, desk);
            }
            Message::Grant(grant) if grant.is_write => {
                self.pushes.on_offer(worker_id, transfer_id, grant, desk);
            }
            Message::Grant(grant) => self.incoming.on_grant(worker_id, transfer_id, &grant, desk),
            Message::Refusal(_) => self.incoming.on_refusal(worker_id, transfer_id, desk),
            Message::Stop(_) if self.servings.serves(worker_id, transfer_id) => {
                self.servings.on_stop(worker_id, transfer_id, desk);
            }
            Message::Stop(_) => self.pushes.on_stop(worker_id, transfer_id, desk),
            Message::Ping(_) => {}
        }
    }

    /// Tells the step loop as much as its queue has room for.
    fn send_reports(&mut self) -> usize {
        let mut sent = 0;
        let Some(commands) = self.commands.upgrade() else {
            self.desk.reports.clear();
            return 0;
        };
        while let Some(report) = self.desk.reports.pop_front() {
            match commands.try_send(Command::Kv(report)) {
                Ok(()) => sent += 1,
                Err(TrySendError::Full(Command::Kv(report))) => {
                    self.desk.reports.push_front(report);
                    return sent;
                }
                Err(_) => {}
            }
        }
        sent
    }

    /// Sleeps until the inbox, a transport or, while something is under way, the clock has something to say.
    fn sleep(&self) {
        let transports = self.desk.pool.manager().transports();
        let wakes = transports.iter().filter_map(|one| one.wake_fd());
        let fds: Vec<BorrowedFd<'_>> = wakes.chain([self.inbox.bell()]).collect();
        let mut fds: Vec<PollFd<'_>> = fds
            .iter()
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        let is_busy = !self.incoming.is_empty()
            || !self.servings.is_empty()
            || !self.pushes.is_empty()
            || !self.offers.is_empty()
            || !self.desk.endings.is_empty()
            || !self.desk.reports.is_empty()
            || self.desk.peers.is_any_leaving();
        let tick = Timespec {
            tv_sec: 0,
            tv_nsec: TICK.subsec_nanos().into(),
        };
        // Interrupted or not: the loop looks at everything again.
        let _ = poll(&mut fds, is_busy.then_some(&tick));
    }
}

/// Another worker wants something kept: the step loop says whether there is room.
fn hear_offer(worker_id: &str, transfer_id: u64, offer: v1::KvOffer, desk: &mut Desk) {
    match offer.from {
        _ if desk.reports.len() >= REPORTS_MAX => {
            desk.send(worker_id, transfer_id, Message::Stop(v1::KvStop {}));
        }
        // Only the sender's own memory: the router has put its name to the message.
        Some(from) if from.worker_id == worker_id => desk.report(Report::Offered(Offered {
            from,
            transfer_id,
            hash_seed: HashSeed(offer.hash_seed),
            token_ids: offer.token_ids,
            max_blocks: offer.max_blocks,
            timeout_ms: offer.timeout_ms,
        })),
        _ => tracing::warn!(worker_id, "a worker offers what is not its own"),
    }
}
