//! Which process listens where.

use std::{
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
};

use rustix::fs::{FlockOperation, flock};

use crate::{
    cli::{self, Up},
    failure::{Explain, Failure, Result},
};

const POSTGRES: u16 = 15432;
const KAFKA: u16 = 19092;
/// Kafka's brokers talk among themselves here.
const CONTROLLER: u16 = 19192;
const SERVICES: [(&str, u16); 8] = [
    ("order-api", 8080),
    ("cdc-relay", 8081),
    ("consumers-relay", 8082),
    ("pharmacy", 8090),
    ("fulfillment", 8091),
    ("messages", 8092),
    ("acks", 8093),
    ("order-view", 8094),
];
/// The consumers, each called by its handler.
pub(crate) const CONSUMERS: [&str; 5] = ["pharmacy", "fulfillment", "messages", "acks", "order-view"];
/// Further instances (`--scale`) take the next free ports from here, in the order of `SERVICES`.
const FURTHER: u16 = 8100;
const FURTHER_TO: u16 = 8999;

/// Free ports come from below those that Linux gives to outgoing connections (32768 and up), so that a port is
/// still free when the server that had it is started again.
const AUTO_FROM: u16 = 20_000;
const AUTO_BLOCKS: u16 = 93;
/// Ports of one block; the largest stack (three brokers, every service at its most instances) needs 135.
const AUTO_BLOCK: u16 = 136;

/// The ports of one stack.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Ports {
    pub postgres: u16,
    pub kafka: Vec<u16>,
    pub controllers: Vec<u16>,
    /// In the order in which the services start; the first instance bears the service's name.
    pub services: Vec<Instance>,
}

/// One instance of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Instance {
    pub service: &'static str,
    pub name: String,
    pub port: u16,
}

/// Chooses the ports, the documented ones or free ones. Fails if a documented one is taken. The file is a claim
/// on a block of free ports, to be held as long as they are used.
pub(crate) fn choose(up: &Up, claims: &Path) -> Result<(Ports, Option<File>)> {
    if up.ports == cli::Ports::Fixed {
        return match fixed(up, is_free) {
            Ok(ports) => Ok((ports, None)),
            Err(port) => Err(in_use(port, owner(port))),
        };
    }
    in_a_block(claims, |block| auto(up, block, is_free)).map(|(ports, claim)| (ports, Some(claim)))
}

/// So many free ports from one block, and the claim on it.
pub(crate) fn further(count: usize, claims: &Path) -> Result<(Vec<u16>, File)> {
    in_a_block(claims, |block| {
        let ports: Vec<u16> = (block..block + AUTO_BLOCK).filter(|port| is_free(*port)).take(count).collect();
        (ports.len() == count).then_some(ports)
    })
}

/// Takes what it needs from the first block that nobody has claimed and that has it.
fn in_a_block<T>(claims: &Path, take: impl Fn(u16) -> Option<T>) -> Result<(T, File)> {
    let start = u16::try_from(std::process::id() % u32::from(AUTO_BLOCKS)).unwrap_or(0);
    for step in 0..AUTO_BLOCKS {
        let block = AUTO_FROM + (start + step) % AUTO_BLOCKS * AUTO_BLOCK;
        let Some(claim) = claim(claims, block)? else { continue };
        if let Some(taken) = take(block) {
            return Ok((taken, claim));
        }
    }
    Err(Failure::new("no free ports between 20000 and 32648"))
}

/// Two stacks that choose at the same moment must not choose the same ports.
fn claim(claims: &Path, block: u16) -> Result<Option<File>> {
    let path = claims.join(format!("ports-{block}.lock"));
    let file = File::create(&path).explain(|| format!("create {}", path.display()))?;
    Ok(flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok().then_some(file))
}

fn fixed(up: &Up, is_free: impl Fn(u16) -> bool) -> std::result::Result<Ports, u16> {
    let mut further = (FURTHER..=FURTHER_TO).filter(|port| is_free(*port));
    lay_out(up, |wanted| match wanted {
        Some(port) if is_free(port) => Ok(port),
        Some(port) => Err(port),
        None => further.next().ok_or(FURTHER_TO),
    })
}

fn auto(up: &Up, block: u16, is_free: impl Fn(u16) -> bool) -> Option<Ports> {
    let mut next = (block..block + AUTO_BLOCK).filter(|port| is_free(*port));
    lay_out(up, |_| next.next().ok_or(())).ok()
}

/// Asks for one port after the other: a documented one by its number, any other by nothing.
fn lay_out<E>(
    up: &Up,
    mut take: impl FnMut(Option<u16>) -> std::result::Result<u16, E>,
) -> std::result::Result<Ports, E> {
    let mut ports = Ports { postgres: take(Some(POSTGRES))?, ..Ports::default() };
    for broker in 0..up.brokers {
        ports.kafka.push(take(Some(KAFKA + broker))?);
        ports.controllers.push(take(Some(CONTROLLER + broker))?);
    }
    if up.infra_only {
        return Ok(ports);
    }
    for (service, port) in SERVICES {
        for number in 1..=up.instances(service) {
            let name = if number == 1 { service.to_owned() } else { format!("{service}-{number}") };
            let port = take((number == 1).then_some(port))?;
            ports.services.push(Instance { service, name, port });
        }
    }
    Ok(ports)
}

/// An address that nobody listens on, and that no outgoing connection takes before somebody does.
pub(crate) fn free() -> Result<SocketAddr> {
    let port = (FURTHER..=FURTHER_TO).find(|port| is_free(*port));
    let port = port.ok_or_else(|| Failure::new(format!("no free port from {FURTHER} to {FURTHER_TO}")))?;
    Ok((Ipv4Addr::LOCALHOST, port).into())
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn in_use(port: u16, owner: Option<(u32, String)>) -> Failure {
    let by = owner.map(|(pid, name)| format!(" by process {pid} ({name})")).unwrap_or_default();
    let stop = if by.is_empty() { "stop what listens there" } else { "stop that process" };
    Failure::new(format!("port {port} is in use{by}"))
        .hint(format!("{stop}, or say --ports auto to take free ports (see endpoints.json for which)"))
}

/// Who listens on this port, if /proc tells.
fn owner(port: u16) -> Option<(u32, String)> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|table| listening(&table, port))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if inodes.is_empty() {
        return None;
    }
    processes().into_iter().find_map(|pid| {
        let mut files = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.filter_map(std::result::Result::ok);
        let holds = files.any(|file| {
            fs::read_link(file.path())
                .is_ok_and(|to| inodes.iter().any(|inode| to.as_os_str() == inode.as_str()))
        });
        let name = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
        holds.then(|| (pid, name()))
    })
}

/// The ids of all processes, if /proc tells.
pub(crate) fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(std::result::Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The inodes of the sockets that listen on `port` in a table of the form of `/proc/net/tcp`.
fn listening(table: &str, port: u16) -> Vec<u64> {
    const LISTEN: &str = "0A";
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let (_, hex) = fields.get(1)?.rsplit_once(':')?;
            let here = u16::from_str_radix(hex, 16).ok()? == port && *fields.get(3)? == LISTEN;
            if here { fields.get(9)?.parse().ok() } else { None }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn up(args: &[&str]) -> Up {
        let all = ["xtask", "up"].iter().chain(args);
        match cli::Cli::parse_from(all).command {
            cli::Command::Up(up) => up,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_documented_ports() {
        let ports = fixed(&up(&["--brokers", "3"]), |_| true).unwrap();
        assert_eq!(ports.postgres, 15432);
        assert_eq!(ports.kafka, [19092, 19093, 19094]);
        let services: Vec<_> = ports.services.iter().map(|i| (i.name.as_str(), i.port)).collect();
        assert_eq!(
            services,
            [
                ("order-api", 8080),
                ("cdc-relay", 8081),
                ("consumers-relay", 8082),
                ("pharmacy", 8090),
                ("fulfillment", 8091),
                ("messages", 8092),
                ("acks", 8093),
                ("order-view", 8094)
            ]
        );
    }

    #[test]
    fn further_instances_take_free_ports_from_8100() {
        let up = up(&["--scale", "order-api=3", "--scale", "pharmacy=2"]);
        let ports = fixed(&up, |port| port != 8101).unwrap();
        let services: Vec<_> = ports.services.iter().map(|i| (i.name.as_str(), i.port)).collect();
        assert_eq!(
            services,
            [
                ("order-api", 8080),
                ("order-api-2", 8100),
                ("order-api-3", 8102),
                ("cdc-relay", 8081),
                ("consumers-relay", 8082),
                ("pharmacy", 8090),
                ("pharmacy-2", 8103),
                ("fulfillment", 8091),
                ("messages", 8092),
                ("acks", 8093),
                ("order-view", 8094)
            ]
        );
    }

    #[test]
    fn a_taken_documented_port_is_named() {
        assert_eq!(fixed(&up(&[]), |port| port != 8090), Err(8090));
        assert!(fixed(&up(&["--infra-only"]), |port| port != 8090).is_ok());
        let text = in_use(8090, Some((7, "nginx".to_owned()))).to_string();
        assert!(text.contains("port 8090 is in use by process 7 (nginx)"), "{text}");
    }

    #[test]
    fn automatic_ports_are_free_and_distinct() {
        let up = up(&["--ports", "auto", "--scale", "pharmacy=4", "--brokers", "3"]);
        let ports = auto(&up, 20_000, |port| port != 20_001).unwrap();
        let mut all = [vec![ports.postgres], ports.kafka, ports.controllers].concat();
        all.extend(ports.services.iter().map(|instance| instance.port));
        assert_eq!(all.len(), 18);
        assert!(
            all.iter().all(|port| (20_000..20_000 + AUTO_BLOCK).contains(port) && *port != 20_001),
            "{all:?}"
        );
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 18);
        assert_eq!(auto(&up, 20_000, |port| port < 20_010), None);
    }

    #[test]
    fn the_largest_stack_fits_into_a_block() {
        let mut largest = up(&["--brokers", "3"]);
        largest.scale = cli::SERVICES.map(|service| (service.to_owned(), cli::INSTANCES_MAX)).to_vec();
        assert!(auto(&largest, 20_000, |_| true).is_some());
        assert_eq!(auto(&largest, 20_000, |port| port > 20_001), None);
    }

    #[test]
    fn a_block_is_claimed_once() {
        let claims = std::env::temp_dir().join(format!("xtask-claims-{}", std::process::id()));
        fs::create_dir_all(&claims).unwrap();
        let first = claim(&claims, 20_000).unwrap();
        assert!(first.is_some());
        assert!(claim(&claims, 20_000).unwrap().is_none());
        drop(first);
        assert!(claim(&claims, 20_000).unwrap().is_some());
        fs::remove_dir_all(&claims).unwrap();
    }

    #[test]
    fn every_block_lies_below_the_ephemeral_ports() {
        assert!(u32::from(AUTO_FROM) + u32::from(AUTO_BLOCKS) * u32::from(AUTO_BLOCK) <= 32_768);
    }

    #[test]
    fn the_owner_of_a_port_is_found() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(!is_free(port));
        if Path::new("/proc/net/tcp").exists() {
            assert_eq!(owner(port).unwrap().0, std::process::id());
        }
    }
}
