//! A line between a worker and its router that can go dead: both live, and neither hears from the other.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
};

/// Hands bytes on, both ways, while it is not dead.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    is_dead: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn start(router: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (is_dead, watched) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, router, watched));
        Self {
            address,
            is_dead,
            _tasks: tasks,
        }
    }

    /// From now on bytes stay where they are, or move again.
    pub(crate) fn set_dead(&self, is_dead: bool) {
        self.is_dead.send_replace(is_dead);
    }
}

async fn accept(listener: TcpListener, router: SocketAddr, is_dead: watch::Receiver<bool>) {
    let mut lines = JoinSet::new();
    loop {
        let (worker, _) = listener.accept().await.unwrap();
        let router = TcpStream::connect(router).await.unwrap();
        let (from_worker, to_worker) = worker.into_split();
        let (from_router, to_router) = router.into_split();
        lines.spawn(hand_on(from_worker, to_router, is_dead.clone()));
        lines.spawn(hand_on(from_router, to_worker, is_dead.clone()));
    }
}

/// Until either side ends.
async fn hand_on(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut is_dead: watch::Receiver<bool>,
) {
    let mut bytes = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        let lives = is_dead.wait_for(|is_dead| !is_dead).await.is_ok();
        if !lives || to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}
