//! A TCP proxy before Postgres that a test can shut, freeze or make lose answers.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    sync::watch,
};

/// What happens to the connections through the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Everything passes.
    Open,
    /// Connections are closed, new ones at once.
    Shut,
    /// Nothing passes, and nobody is told.
    Frozen,
    /// What the server sends is thrown away and the connection closed; only as often as was asked.
    LoseAnswers,
}

/// The proxy; it ends with the runtime.
pub(crate) struct Gate {
    pub(crate) address: SocketAddr,
    mode: watch::Sender<Mode>,
    to_pass: Arc<AtomicU32>,
    to_lose: Arc<AtomicU32>,
    after: Arc<watch::Sender<Mode>>,
    sent: Arc<AtomicU32>,
}

impl Gate {
    /// A gate on `listen` before `target`.
    pub(crate) fn new(runtime: &Runtime, listen: SocketAddr, target: SocketAddr) -> Self {
        let (mode, modes) = watch::channel(Mode::Open);
        let (to_pass, to_lose) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let after = Arc::new(watch::channel(Mode::Open).0);
        let listener = runtime.block_on(TcpListener::bind(listen)).unwrap();
        let address = listener.local_addr().unwrap();
        let sent = Arc::new(AtomicU32::new(0));
        let counts = (Arc::clone(&to_pass), Arc::clone(&to_lose), Arc::clone(&sent));
        let shared = (mode.clone(), Arc::clone(&after), counts);
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if *modes.borrow() == Mode::Shut {
                    continue;
                }
                let (shared, modes) = (shared.clone(), modes.clone());
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(target).await else { return };
                    forward(client, server, modes, shared).await;
                });
            }
        });
        Self { address, mode, to_pass, to_lose, after, sent }
    }

    /// How many times a client has sent something: the round trips so far.
    pub(crate) fn sent(&self) -> u32 {
        self.sent.load(Ordering::SeqCst)
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// One answer is lost, and its connection with it, after so many that pass.
    pub(crate) fn lose_answer_after(&self, passed: u32) {
        self.to_pass.store(passed, Ordering::SeqCst);
        self.lose_answers(1, Mode::Open);
    }

    /// The next `count` answers are lost, and their connections with them; then the gate is as `after` says.
    pub(crate) fn lose_answers(&self, count: u32, after: Mode) {
        self.after.send_replace(after);
        self.to_lose.store(count, Ordering::SeqCst);
        self.set(Mode::LoseAnswers);
    }
}

type Counts = (Arc<AtomicU32>, Arc<AtomicU32>, Arc<AtomicU32>);
type Shared = (watch::Sender<Mode>, Arc<watch::Sender<Mode>>, Counts);

async fn forward(client: TcpStream, server: TcpStream, mut modes: watch::Receiver<Mode>, shared: Shared) {
    let (mode, after, (to_pass, to_lose, sent)) = shared;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let (mut up, mut down) = (vec![0; 65536], vec![0; 65536]);
    // A connection that was made after the order to lose answers is not one that loses them: it is the retry.
    let made_to_lose = *modes.borrow() == Mode::LoseAnswers;
    loop {
        let now = *modes.borrow_and_update();
        match now {
            Mode::Shut => return,
            Mode::Frozen => {
                if modes.changed().await.is_err() {
                    return;
                }
                continue;
            }
            Mode::Open | Mode::LoseAnswers => {}
        }
        tokio::select! {
            biased;
            changed = modes.changed() => if changed.is_err() { return },
            read = from_client.read(&mut up) => match read {
                Ok(n) if n > 0 => {
                    sent.fetch_add(1, Ordering::SeqCst);
                    if to_server.write_all(&up[..n]).await.is_err() { return }
                }
                _ => return,
            },
            read = from_server.read(&mut down) => match read {
                Ok(n) if n > 0 => {
                    let passes = |left: u32| left.checked_sub(1);
                    if now == Mode::LoseAnswers
                        && !made_to_lose
                        && to_pass.fetch_update(Ordering::SeqCst, Ordering::SeqCst, passes).is_err()
                    {
                        if to_lose.fetch_sub(1, Ordering::SeqCst) == 1 {
                            mode.send_replace(*after.borrow());
                        }
                        return;
                    }
                    if to_client.write_all(&down[..n]).await.is_err() { return }
                }
                _ => return,
            },
        }
    }
}
