//! Workers with pools, and the part of a router that hands their messages on.

use std::{
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use orchestra_agent::{AgentConfig, KvTransports};
use orchestra_proto::v1::{
    FinishReason, KvPeer, LoadReport, PeerMessage, SequenceOutput, StartSequence, WorkerHello,
    router_message::Message as Down, worker_message::Message as Up,
};
use parking_lot::Mutex;

use super::{
    FakeRouter, KvEngine, PATIENCE, config, kv_pool, messages::outputs_of, router::SessionSender,
};

/// A worker's attachment, at its router.
pub(crate) struct Line {
    pub(crate) hello: WorkerHello,
    down: Arc<SessionSender>,
    outputs: mpsc::Receiver<SequenceOutput>,
    load: Arc<Mutex<LoadReport>>,
    _router: FakeRouter,
}

/// One worker of this process.
pub(crate) struct Member {
    pub(crate) engine: KvEngine,
    line: Line,
}

impl Deref for Member {
    type Target = Line;

    fn deref(&self) -> &Line {
        &self.line
    }
}

/// Where messages to each worker go in, by name.
type Doors = Arc<Mutex<Vec<(String, Arc<SessionSender>)>>>;

/// Sees who sends what to another worker, before that gets it.
type Look = Box<dyn FnMut(&str, &PeerMessage) + Send>;

/// Some workers.
pub(crate) struct Cluster {
    pub(crate) members: Vec<Member>,
    doors: Doors,
    look: Arc<Mutex<Look>>,
    /// Messages between workers are lost.
    pub(crate) is_deaf: Arc<AtomicBool>,
}

impl Cluster {
    pub(crate) fn start(transports: &[KvTransports], change: impl Fn(&mut AgentConfig)) -> Self {
        let mut cluster = Self {
            members: Vec::new(),
            doors: Doors::default(),
            look: Arc::new(Mutex::new(Box::new(|_, _| {}))),
            is_deaf: Arc::new(AtomicBool::new(false)),
        };
        for (number, &transport) in transports.iter().enumerate() {
            cluster.add(&format!("worker-{number}"), transport, &change);
        }
        cluster
    }

    fn add(&mut self, name: &str, transport: KvTransports, change: &impl Fn(&mut AgentConfig)) {
        let router = FakeRouter::start();
        let mut config = config(router.address);
        config.worker_id = name.to_owned();
        change(&mut config);
        let pool = kv_pool(&config, transport);
        let engine = KvEngine::start(&config, pool);
        let line = self.attach(router);
        self.members.push(Member { engine, line });
    }

    /// From now on `look` sees the messages between workers.
    pub(crate) fn look(&self, look: impl FnMut(&str, &PeerMessage) + Send + 'static) {
        *self.look.lock() = Box::new(look);
    }

    /// Takes in the worker that dials this router.
    pub(crate) fn attach(&self, mut router: FakeRouter) -> Line {
        let (mut session, hello) = router.welcome();
        let down = Arc::new(session.sender());
        let name = hello.worker_id.clone();
        self.doors.lock().push((name.clone(), Arc::clone(&down)));
        let (sender, outputs) = mpsc::channel();
        let (doors, is_deaf) = (Arc::clone(&self.doors), Arc::clone(&self.is_deaf));
        let look = Arc::clone(&self.look);
        let load = Arc::new(Mutex::new(LoadReport::default()));
        let last_load = Arc::clone(&load);
        thread::spawn(move || {
            while let Some(message) = session.try_next() {
                match message {
                    Up::ToPeer(message) => {
                        (*look.lock())(&name, &message);
                        if !is_deaf.load(Ordering::SeqCst) {
                            hand_on(&doors, &name, message);
                        }
                    }
                    Up::Load(report) => *last_load.lock() = report,
                    other => {
                        for output in outputs_of(other).unwrap_or_default() {
                            let _ = sender.send(output);
                        }
                    }
                }
            }
            doors.lock().retain(|(it, _)| *it != name);
        });
        Line {
            hello,
            down,
            outputs,
            load,
            _router: router,
        }
    }
}

fn hand_on(doors: &Doors, from: &str, message: PeerMessage) {
    let doors = doors.lock();
    let door = |name: &str| doors.iter().find(|(it, _)| it == name).map(|(_, it)| it);
    match door(&message.worker_id) {
        Some(door) => door.try_send(Down::FromPeer(PeerMessage {
            worker_id: from.to_owned(),
            ..message
        })),
        None => door(from).unwrap().try_send(Down::FromPeer(PeerMessage {
            worker_id: message.worker_id,
            payload: Vec::new(),
            is_undeliverable: true,
        })),
    }
}

impl Line {
    /// What the worker said last of its load.
    pub(crate) fn load(&self) -> LoadReport {
        *self.load.lock()
    }

    /// What other workers need to reach this one.
    pub(crate) fn peer(&self) -> KvPeer {
        let announced = self.hello.kv_transfer.clone().unwrap();
        KvPeer {
            worker_id: self.hello.worker_id.clone(),
            epoch: announced.epoch,
            metadata: announced.metadata,
            host: announced.host,
        }
    }

    pub(crate) fn start(&self, start: StartSequence) {
        self.down.send(Down::Start(start));
    }

    pub(crate) fn send(&self, message: Down) {
        self.down.send(message);
    }

    /// Everything of one sequence, until its end.
    pub(crate) fn finish(&self, sequence_id: u64) -> SequenceOutput {
        let mut all = SequenceOutput::default();
        loop {
            let output = self.outputs.recv_timeout(PATIENCE).expect("an output");
            assert_eq!(output.sequence_id, sequence_id);
            let tokens = [all.token_ids, output.token_ids.clone()].concat();
            all = SequenceOutput {
                token_ids: tokens,
                ..output
            };
            if all.finish_reason() != FinishReason::Unspecified {
                return all;
            }
        }
    }

    /// Runs a sequence to its end.
    pub(crate) fn run(&self, start: StartSequence) -> SequenceOutput {
        let sequence_id = start.sequence_id;
        self.start(start);
        self.finish(sequence_id)
    }
}
