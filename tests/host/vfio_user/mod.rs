//! Clients and servers of vfio-user: ours, others', and hostile ones.

mod both_ends;
mod cost;
mod hostile_clients;
mod hostile_servers;
mod interop;
mod leftovers;
