//! What is offered to a keeper, and what becomes of it when either side falls silent in the middle: real processes, real
//! signals.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver},
    },
    time::Duration,
};

use orchestra_agent::KvTransports::{Shm, Tcp};
use orchestra_proto::v1::{
    KvAsk, KvKeeper, KvMessage, KvOffer, KvPeer, KvRefusal, KvStop, PeerMessage, StartSequence,
    kv_message::Message, router_message::Message as Down,
};
use prost::Message as _;
use rustix::process::{Signal, WaitOptions, kill_process, waitpid};

use crate::{
    kv_faults::Process,
    support::{Cluster, Line, PATIENCE, eventually, happens_within, reference, start},
};

const NAME: &str = "writer";
/// Blocks of a prompt, and their tokens.
const BLOCKS: u64 = 5;
const TOKENS: u64 = 20;
/// What the copies of a prompt are waited for before the next is tried.
const KEEPING_TIME: Duration = Duration::from_millis(200);

/// A prompt of its own for each number.
fn request(number: u64, max_tokens: u32) -> StartSequence {
    start(number, 22, max_tokens)
}

/// Runs it: the tokens are those that the prompt has to give.
fn check(line: &Line, request: StartSequence) {
    let expected = reference(&request.prompt_token_ids, 4);
    assert_eq!(line.run(request).token_ids, expected);
}

fn decode(message: &PeerMessage) -> (u64, Message) {
    let message = KvMessage::decode(&*message.payload).unwrap();
    (message.transfer_id, message.message.unwrap())
}

/// A writer whose keepers are played by the test.
struct Writer {
    process: Process,
    letters: Receiver<(String, u64, Message)>,
    cluster: Cluster,
}

impl Writer {
    fn start() -> Self {
        let cluster = Cluster::start(&[Shm], |_| {});
        cluster.is_deaf.store(true, Ordering::SeqCst);
        let (sender, letters) = mpsc::channel();
        cluster.look(move |from, message| {
            let (transfer_id, content) = decode(message);
            if from == NAME {
                let _ = sender.send((message.worker_id.clone(), transfer_id, content));
            }
        });
        Self {
            process: Process::start_writer(&cluster, Shm, NAME),
            letters,
            cluster,
        }
    }

    /// A keeper of this name, with the memory of a worker that knows nothing of this.
    fn peer(&self, name: &str) -> KvPeer {
        KvPeer {
            worker_id: name.to_owned(),
            ..self.cluster.members[0].peer()
        }
    }

    fn write_through_to(&self, name: &str) {
        let peer = Some(self.peer(name));
        self.process.line.send(Down::Keeper(KvKeeper { peer }));
    }

    /// The next thing that it says to a keeper.
    fn hear(&self) -> (String, u64, Message) {
        self.letters.recv_timeout(PATIENCE).expect("a message")
    }

    fn hear_offer(&self, name: &str) -> (u64, KvOffer) {
        match self.hear() {
            (to, transfer_id, Message::Offer(offer)) if to == name => (transfer_id, offer),
            other => panic!("{other:?}"),
        }
    }

    fn say(&self, from: &str, transfer_id: u64, message: Message) {
        let message = Some(message);
        let message = KvMessage {
            transfer_id,
            message,
        };
        self.process.line.send(Down::FromPeer(PeerMessage {
            worker_id: from.to_owned(),
            payload: message.encode_to_vec(),
            is_undeliverable: false,
        }));
    }
}

#[test]
fn what_nobody_has_read_is_offered_again_and_what_is_declined_is_not() {
    let writer = Writer::start();
    writer.write_through_to("first");
    check(&writer.process.line, request(1, 4));
    let (_, offered) = writer.hear_offer("first");
    assert_eq!(offered.token_ids, request(1, 4).prompt_token_ids[..20]);
    writer.write_through_to("second");
    let (_, again) = writer.hear_offer("second");
    assert_eq!(again.token_ids, offered.token_ids);
    // It stands still: when the time is over it is asked anew.
    let (transfer_id, again) = writer.hear_offer("second");
    assert_eq!(again.token_ids, offered.token_ids);
    writer.say("second", transfer_id, Message::Stop(KvStop {}));
    check(&writer.process.line, request(2, 4));
    let (_, next) = writer.hear_offer("second");
    assert_eq!(next.token_ids, request(2, 4).prompt_token_ids[..20]);
}

#[test]
fn a_keeper_that_asks_and_does_not_read_holds_blocks_for_as_long_as_it_asked() {
    let writer = Writer::start();
    let line = &writer.process.line;
    writer.write_through_to("keeper");
    check(line, request(1, 4));
    let (transfer_id, offer) = writer.hear_offer("keeper");
    let ask = KvAsk {
        from: Some(writer.peer("keeper")),
        to_epoch: line.peer().epoch ^ 1,
        hash_seed: offer.hash_seed,
        token_ids: offer.token_ids,
        first_block: 0,
        timeout_ms: 2_000,
    };
    writer.say("keeper", transfer_id, Message::Ask(ask.clone()));
    let (.., refusal) = writer.hear();
    assert_eq!(
        refusal,
        Message::Refusal(KvRefusal {}),
        "another start of it"
    );
    let ask = KvAsk {
        to_epoch: line.peer().epoch,
        ..ask
    };
    writer.say("keeper", transfer_id, Message::Ask(ask));
    match writer.hear() {
        (_, _, Message::Grant(grant)) => assert_eq!(grant.blocks.len() as u64, BLOCKS),
        other => panic!("{other:?}"),
    }
    eventually("they are held", || {
        u64::from(line.load().kv_blocks_used) == BLOCKS
    });
    check(line, request(2, 4));
    eventually("they are free again", || line.load().kv_blocks_used == 0);
}

/// A keeper, and a writer that stands still between its grant and the first byte that is read.
fn a_stopped_writer() -> (Cluster, Process, Arc<AtomicBool>) {
    // What one prompt needs, and as much again for the worker's own.
    let cluster = Cluster::start(&[Tcp], |config| {
        config.scheduler.num_host_blocks = 2 * BLOCKS as u32;
    });
    let writer = Process::start_writer(&cluster, Tcp, NAME);
    let pid = writer.pid();
    let [has_stopped, was_given_up] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let (stopped, given_up) = (Arc::clone(&has_stopped), Arc::clone(&was_given_up));
    cluster.look(move |_, message| match decode(message).1 {
        Message::Grant(_) if !stopped.load(Ordering::SeqCst) => {
            kill_process(pid, Signal::STOP).unwrap();
            waitpid(Some(pid), WaitOptions::UNTRACED).unwrap();
            stopped.store(true, Ordering::SeqCst);
        }
        Message::Stop(_) => given_up.store(true, Ordering::SeqCst),
        _ => {}
    });
    // All of the answer is out before anybody asks.
    check(&writer.line, request(1, 4));
    write_through(&cluster, &writer);
    eventually("it has stopped", || has_stopped.load(Ordering::SeqCst));
    (cluster, writer, was_given_up)
}

fn write_through(cluster: &Cluster, writer: &Process) {
    let peer = Some(cluster.members[0].peer());
    writer.line.send(Down::Keeper(KvKeeper { peer }));
}

/// The keeper has none of the first prompt. Its host memory comes back: a later prompt is kept in it, whole.
fn check_keeper(cluster: &Cluster, writer: &Process) {
    let keeper = &cluster.members[0];
    let stats = || keeper.engine.agent.stats();
    check(keeper, request(1, 4));
    assert_eq!(stats().host_hit_tokens, 0);
    keeper.engine.wait_until_quiet();
    let number = Cell::new(100);
    // Until all of the room is back a prompt may be declined, or kept in part.
    eventually("a prompt is kept whole", || {
        number.set(number.get() + 1);
        let (before, prompt) = (stats(), request(number.get(), 4));
        check(&writer.line, prompt.clone());
        let is_kept = || stats().kv_blocks_kept >= before.kv_blocks_kept + BLOCKS;
        happens_within(KEEPING_TIME, is_kept) && {
            check(keeper, prompt);
            stats().host_hit_tokens >= before.host_hit_tokens + TOKENS
        }
    });
}

#[test]
fn a_writer_that_is_killed_while_it_is_read_leaves_nothing() {
    let (cluster, writer, _) = a_stopped_writer();
    writer.signal(Signal::KILL);
    let next = Process::start_writer(&cluster, Tcp, "next");
    write_through(&cluster, &next);
    check_keeper(&cluster, &next);
}

#[test]
fn a_writer_that_is_stopped_while_it_is_read_leaves_nothing_and_is_read_when_it_goes_on() {
    let (cluster, writer, was_given_up) = a_stopped_writer();
    eventually("the keeper gives up", || {
        was_given_up.load(Ordering::SeqCst)
    });
    writer.signal(Signal::CONT);
    check_keeper(&cluster, &writer);
}
