//! A network between a relay and its Postgres that can go away without a word.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::spawn,
};

use crate::database::Database;

/// Cut, it swallows what either side says, and closes nothing.
pub(crate) struct Network {
    /// The database's connection string, through this.
    pub(crate) url: String,
    is_cut: Arc<AtomicBool>,
}

impl Network {
    pub(crate) fn to(database: &Database) -> Self {
        let direct = database.url();
        let port = direct.rsplit(':').next().and_then(|rest| rest.split('/').next()).unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = listener.local_addr().unwrap().port();
        let is_cut = Arc::new(AtomicBool::new(false));
        let url = direct.replace(&format!(":{port}/"), &format!(":{here}/"));
        let cut = Arc::clone(&is_cut);
        let server = format!("127.0.0.1:{port}");
        spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(&server) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let cut = Arc::clone(&cut);
                    spawn(move || forward(from, to, &cut));
                }
            }
        });
        Self { url, is_cut }
    }

    /// For good: what was swallowed is gone.
    pub(crate) fn cut(&self) {
        self.is_cut.store(true, Ordering::Relaxed);
    }
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
