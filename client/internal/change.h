// What makes a request a change that may be repeated.
#ifndef NORMD_CLIENT_INTERNAL_CHANGE_H_
#define NORMD_CLIENT_INTERNAL_CHANGE_H_

#include "client/internal/request_id.h"
#include "client/normd_client.h"

namespace normd::inline client::internal {

// Gives `request` its id, and its expected_version where it takes one.
template <class Request>
void MarkChange(const CallOptions& call, Request* request) {
  request->set_request_id(call.request_id.empty() ? NewRequestId() : call.request_id);
  if constexpr (requires { request->set_expected_version(0); }) {
    if (call.expected_version) request->set_expected_version(*call.expected_version);
  }
}

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_CHANGE_H_
