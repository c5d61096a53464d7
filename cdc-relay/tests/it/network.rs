//! A network between a relay and its servers that can go away without a word, or keeps something back.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::spawn,
    time::Duration,
};

use crate::database::Database;

/// How long what must happen may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Cut, it swallows what either side says, and closes nothing.
pub(crate) struct Network {
    /// The database's connection string, through this.
    pub(crate) url: String,
    connections: Arc<Mutex<Vec<Arc<AtomicBool>>>>,
}

impl Network {
    pub(crate) fn to(database: &Database) -> Self {
        let (url, listener, server) = before(&database.url());
        Self { url, connections: pass_on(listener, server) }
    }

    /// Of all connections that there are, and for good: what was swallowed is gone.
    pub(crate) fn cut(&self) {
        for is_cut in self.connections.lock().unwrap().iter() {
            is_cut.store(true, Ordering::Relaxed);
        }
    }
}

/// A connection string that leads to the listener, and where the one that is given leads to.
fn before(direct: &str) -> (String, TcpListener, String) {
    let port = direct.rsplit(':').next().and_then(|rest| rest.split('/').next()).unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = listener.local_addr().unwrap().port();
    let url = direct.replace(&format!(":{port}/"), &format!(":{here}/"));
    (url, listener, format!("127.0.0.1:{port}"))
}

const START: &[u8] = b"START_REPLICATION";

/// Keeps back the first `START_REPLICATION`.
pub(crate) struct Gate {
    /// The connection string through this.
    pub(crate) url: String,
    asked: Receiver<()>,
    open: Sender<()>,
}

impl Gate {
    /// `direct` ends with `:PORT/DATABASE`.
    pub(crate) fn to(direct: &str) -> Self {
        let (url, listener, server) = before(direct);
        let ((ask, asked), (open, opened)) = (channel(), channel());
        // Whoever takes it waits.
        let first = Mutex::new(Some((ask, opened)));
        let look = move |sent: &[u8]| {
            if !sent.windows(START.len()).any(|window| window == START) {
                return;
            }
            let taken = first.lock().unwrap().take();
            if let Some((ask, opened)) = taken {
                let _ = ask.send(());
                let _ = opened.recv();
            }
        };
        pass_on_after(listener, server, Arc::new(look));
        Self { url, asked, open }
    }

    /// Waits until it keeps something back.
    pub(crate) fn wait(&self) {
        self.asked.recv_timeout(LIMIT).expect("the slot is asked for");
    }

    pub(crate) fn open(&self) {
        self.open.send(()).unwrap();
    }
}

/// Passes connections on to a server; for each, whether it is cut.
pub(crate) fn pass_on(listener: TcpListener, server: String) -> Arc<Mutex<Vec<Arc<AtomicBool>>>> {
    pass_on_after(listener, server, Arc::new(|_: &[u8]| ()))
}

/// Looks at what is passed on.
type Look = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// As [`pass_on`], after `look` has returned from a look at what is passed on.
fn pass_on_after(listener: TcpListener, server: String, look: Look) -> Arc<Mutex<Vec<Arc<AtomicBool>>>> {
    let connections = Arc::new(Mutex::new(Vec::new()));
    let known = Arc::clone(&connections);
    spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let Ok(server) = TcpStream::connect(&server) else { continue };
            let is_cut = Arc::new(AtomicBool::new(false));
            known.lock().unwrap().push(Arc::clone(&is_cut));
            for (from, to) in [(&client, &server), (&server, &client)] {
                let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                let (cut, look) = (Arc::clone(&is_cut), Arc::clone(&look));
                spawn(move || forward(from, to, &cut, &*look));
            }
        }
    });
    connections
}

fn forward(mut from: TcpStream, mut to: TcpStream, is_cut: &AtomicBool, look: &dyn Fn(&[u8])) {
    let mut buffer = vec![0; 65_536];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        look(&buffer[..read]);
        if !is_cut.load(Ordering::Relaxed) && to.write_all(&buffer[..read]).is_err() {
            return;
        }
    }
    if !is_cut.load(Ordering::Relaxed) {
        let _ = to.shutdown(Shutdown::Write);
    }
}

/// Below those that Linux gives to outgoing connections (32768 and up) and those of whole stacks (20000 and up): what
/// is free now stays free until the broker takes it.
pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    let mut free = (12_000..20_000).filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    std::array::from_fn(|_| free.next().expect("a free port"))
}
