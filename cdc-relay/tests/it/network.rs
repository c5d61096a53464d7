//! A network between a relay and its servers that can go away without a word.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::spawn,
};

use crate::database::Database;

/// Cut, it swallows what either side says, and closes nothing.
pub(crate) struct Network {
    /// The database's connection string, through this.
    pub(crate) url: String,
    connections: Arc<Mutex<Vec<Arc<AtomicBool>>>>,
}

impl Network {
    pub(crate) fn to(database: &Database) -> Self {
        let direct = database.url();
        let port = direct.rsplit(':').next().and_then(|rest| rest.split('/').next()).unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = listener.local_addr().unwrap().port();
        let url = direct.replace(&format!(":{port}/"), &format!(":{here}/"));
        Self { url, connections: pass_on(listener, format!("127.0.0.1:{port}")) }
    }

    /// Of all connections that there are, and for good: what was swallowed is gone.
    pub(crate) fn cut(&self) {
        for is_cut in self.connections.lock().unwrap().iter() {
            is_cut.store(true, Ordering::Relaxed);
        }
    }
}

/// Passes connections on to a server; for each, whether it is cut.
pub(crate) fn pass_on(listener: TcpListener, server: String) -> Arc<Mutex<Vec<Arc<AtomicBool>>>> {
    let connections = Arc::new(Mutex::new(Vec::new()));
    let known = Arc::clone(&connections);
    spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let Ok(server) = TcpStream::connect(&server) else { continue };
            let is_cut = Arc::new(AtomicBool::new(false));
            known.lock().unwrap().push(Arc::clone(&is_cut));
            for (from, to) in [(&client, &server), (&server, &client)] {
                let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                let cut = Arc::clone(&is_cut);
                spawn(move || forward(from, to, &cut));
            }
        }
    });
    connections
}

fn forward(mut from: TcpStream, mut to: TcpStream, is_cut: &AtomicBool) {
    let mut buffer = vec![0; 65_536];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
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
